"""One log file per app: appended to, rotated by size, and read by any number of readers at their own pace.

Appending and reading are plain file operations on the page cache, done on the event loop in pieces of at most 64 KiB.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flynn.host.logs.record import Cursor, Decoder, Record

ROTATE_BYTES = 100 << 20
CHUNK_BYTES = 64 << 10
FORGOTTEN = timedelta(days=30)
NO_APP = "_"  # file of the jobs without an app


class AppLog:
    """The files of one app: `<app>.log`, and one rotated `<app>-<time>.log`."""

    def __init__(self, directory: Path, app_id: str, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._directory, self._name, self._rotate_bytes = directory, app_id or NO_APP, rotate_bytes
        self.path = directory / f"{self._name}.log"
        self.generation = 0  # counts rotations, so that a reader knows that its file has a successor
        self._descriptor: int | None = None
        self._size = 0
        self._readers: set[LogReader] = set()

    def append(self, data: bytes) -> None:
        """Add whole records; readers wake up. Raises `OSError` when the disk refuses."""
        if self._descriptor is None:
            self._open()
        elif self._size >= self._rotate_bytes:
            self._rotate()
        assert self._descriptor is not None
        view, before = memoryview(data), self._size
        try:
            while view:
                written = os.write(self._descriptor, view)
                self._size += written
                view = view[written:]
        except OSError:
            if self._size > before:  # half a record would spoil the next one
                os.ftruncate(self._descriptor, before)
                self._size = before
            raise
        for reader in self._readers:
            reader.changed.set()

    def close(self) -> None:
        """Give the descriptor back; a later append opens the file again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # a crash has cut the last record off: keep it away from the next

    def _rotate(self) -> None:
        self.close()
        for old in self.rotated():
            old.unlink(missing_ok=True)
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3]
        self.path.rename(self._directory / f"{self._name}-{stamp}.log")
        self.generation += 1
        self._open()

    def rotated(self) -> list[Path]:
        """Return the rotated files, oldest first."""
        return sorted(self._directory.glob(f"{self._name}-????-??-??T*.log"))

    def reader(self, *, history: bool) -> LogReader:
        """Return a reader that starts with the oldest line there is, or with the next one. Close it when done."""
        reader = LogReader(self, history=history)
        self._readers.add(reader)
        return reader

    def forget(self, reader: LogReader) -> None:
        self._readers.discard(reader)

    @property
    def idle(self) -> bool:
        """Nobody reads."""
        return not self._readers


class LogReader:
    """A position in an app's log. `available` gives what is there, `changed` tells when to look again."""

    def __init__(self, log: AppLog, *, history: bool) -> None:
        self.changed = asyncio.Event()
        self._log = log
        self._pending: list[Path] = [*log.rotated(), log.path] if history else [log.path]
        self._generation = log.generation
        self._descriptor: int | None = None
        self._rest = b""
        self._decoder = Decoder()
        if history:
            self.changed.set()
        else:
            self._next_file()
            if self._descriptor is not None:
                os.lseek(self._descriptor, 0, os.SEEK_END)

    def available(self, *, after: Cursor = (0, 0)) -> Iterator[Record]:
        """Yield the records not read yet that come after a cursor, until the present end of the log."""
        self.changed.clear()
        decode = self._decoder.decode
        while True:
            if self._descriptor is None and not self._next_file(after):
                return
            assert self._descriptor is not None
            chunk = os.read(self._descriptor, CHUNK_BYTES)
            if not chunk:
                if self._pending or self._log.generation != self._generation:
                    # This file is finished: it was a rotated one, or has become one.
                    self.close_file()
                    continue
                return
            lines = (self._rest + chunk).split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                found = decode(line)
                if found is not None and found.cursor > after:
                    yield found

    def _next_file(self, after: Cursor = (0, 0)) -> bool:
        if not self._pending:
            # The successor of a file that was rotated away under us.
            self._generation = self._log.generation
            self._pending = [self._log.path]
        while self._pending:
            path = self._pending[0]
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if path == self._log.path:
                    return False  # nothing was logged yet
                self._pending.pop(0)
                continue
            self._pending.pop(0)
            if self._pending and os.fstat(descriptor).st_mtime_ns // 1000 < after[0]:
                os.close(descriptor)  # everything in it is older
                continue
            self._descriptor, self._rest = descriptor, b""
            return True
        return False

    def close_file(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        self.close_file()
        self._log.forget(self)


class LogDirectory:
    """All app logs of a host, and the stamps that order their lines."""

    def __init__(self, directory: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._directory, self._rotate_bytes = directory, rotate_bytes
        self._logs: dict[str, AppLog] = {}
        self._last, self._sequence = 0, 0
        self.listeners: set[asyncio.Event] = set()  # set when any app has a line

    def app(self, app_id: str) -> AppLog:
        key = app_id or NO_APP
        if key not in self._logs:
            self._logs[key] = AppLog(self._directory, key, self._rotate_bytes)
        return self._logs[key]

    def apps(self) -> list[str]:
        """Return the ids of all apps with a log, on disk or open; without the jobs of no app."""
        names = {path.stem for path in self._directory.glob("*.log") if is_app_id(path.stem)}
        return sorted(names | {key for key in self._logs if key != NO_APP})

    def old_files(self) -> list[Path]:
        """Return the rotated files of all apps, the oldest first."""
        return sorted(self._directory.glob("*-????-??-??T*.log"), key=lambda file: file.stat().st_mtime)

    def collect(self, apps: Collection[str], now: float) -> list[str]:
        """Delete the logs of apps that have no job here and have not logged for `FORGOTTEN`; return their ids."""
        gone = []
        for app_id in self.apps():
            app = self.app(app_id)
            try:
                idle = now - app.path.stat().st_mtime > FORGOTTEN.total_seconds()
            except FileNotFoundError:
                continue
            if idle and app_id not in apps and app.idle:
                app.close()
                for file in [*app.rotated(), app.path]:
                    file.unlink(missing_ok=True)
                del self._logs[app_id]
                gone.append(app_id)
        return gone

    def open_apps(self) -> set[str]:
        """Return the ids of the apps that have logged since the start of the daemon."""
        return {key for key in self._logs if key != NO_APP}

    def stamp(self, lines: int = 1) -> Cursor:
        """Return the cursor of the next of so many lines: time never goes back within a daemon's life."""
        self._last = max(self._last, time.time_ns() // 1000)
        first = self._sequence + 1
        self._sequence += lines
        return self._last, first

    def appended(self, app_id: str) -> None:
        """Tell those who follow all apps."""
        for listener in self.listeners:
            listener.set()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()


def is_app_id(name: str) -> bool:
    """Tell whether a file name without suffix is a lower-case UUID: rotated files and the daemon's own are not."""
    parts = name.split("-")
    return [len(part) for part in parts] == [8, 4, 4, 4, 12] and all(c in "0123456789abcdef" for c in "".join(parts))
