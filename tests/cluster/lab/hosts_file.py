"""Our block of /etc/hosts: names under the cluster's domain, between two marks. Pure, but for the writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BEGIN = "# begin flynn development cluster"
END = "# end flynn development cluster"
PATH = Path("/etc/hosts")


def without_block(text: str) -> str:
    kept, inside = [], False
    for line in text.splitlines():
        if line == BEGIN:
            inside = True
        elif line == END:
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"


def with_block(text: str, address: str, names: Sequence[str]) -> str:
    return without_block(text) + "\n".join([BEGIN, *(f"{address} {name}" for name in names), END]) + "\n"


def publish(address: str, names: Sequence[str]) -> None:
    _write(with_block(PATH.read_text(), address, names))


def withdraw() -> None:
    text = PATH.read_text()
    if BEGIN in text:
        _write(without_block(text))


def _write(text: str) -> None:
    # In place: /etc/hosts may be a mount of its own, which cannot be renamed over.
    PATH.write_text(text)
