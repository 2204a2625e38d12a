"""What the developer sees of a build: the line format that git shows after `remote:`.

Headlines begin with dashes or equal signs, all else is indented by seven blanks. `ESC[1G` moves the cursor to column
one, so that a terminal overwrites the `remote: ` that git puts in front of every line.
"""

from __future__ import annotations

TO_COLUMN_ONE = b"\x1b[1G"
INDENT = b" " * 7
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def headline(text: str) -> bytes:
    return TO_COLUMN_ONE + b"-----> " + text.encode("utf-8", "replace") + b"\n"


def indented(line: bytes) -> bytes:
    """Return one line of a buildpack's output as shown. What a buildpack indented by itself is not indented twice."""
    line = line.rstrip(b"\r\n \t")
    if line.startswith((b"--", b"==")):
        return TO_COLUMN_ONE + line + b"\n"
    return TO_COLUMN_ONE + INDENT + line.removeprefix(INDENT) + b"\n"


def human_size(size: int) -> str:
    """Return a number of bytes with four significant digits and a binary unit: `18.42 MiB`."""
    amount = float(size)
    for unit in _UNITS:
        if amount < 1024 or unit == _UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"
