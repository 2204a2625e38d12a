"""Beginnings of lines that the daemon has read from a job and not yet logged, kept where the next daemon finds them.

A job's line may begin under one daemon and end under the next. What was read is gone from the pipe, so the beginning
is kept in a file of the job's directory for as long as it waits for its newline.
"""

from __future__ import annotations

import os
from pathlib import Path

_LENGTH_DIGITS = 8


class Unfinished:
    """The beginning of one stream's next line. The file exists once there has been one; it goes with the directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._kept = b""

    def take(self) -> bytes:
        """Return what an earlier daemon has left, b"" if nothing (or nothing whole: it was killed while writing)."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return b""
        length, rest = content[:_LENGTH_DIGITS], content[_LENGTH_DIGITS:]
        if not length.isdigit() or int(length) > len(rest):
            return b""
        self._kept = rest[: int(length)]
        return self._kept

    def keep(self, beginning: bytes) -> None:
        """Replace what is kept. Costs one write when a chunk ends within a line, else nothing.

        Raises `OSError` when the disk refuses.
        """
        if beginning == self._kept:
            return
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
        # One write of length and content: a daemon killed in between leaves the old or the new one.
        os.pwrite(self._descriptor, b"%0*d%b" % (_LENGTH_DIGITS, len(beginning), beginning), 0)
        self._kept = beginning

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
