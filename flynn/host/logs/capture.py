"""Reading what a job prints and putting it into its app's log."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from flynn.host.attach import Stream
from flynn.host.logs import record
from flynn.host.logs.files import LogDirectory
from flynn.host.logs.record import LineSplitter, Source
from flynn.host.logs.unfinished import Unfinished

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 10


class Capture:
    """The output of one job on its way into the log.

    `ended` once every stream has been read to its end and the host has nothing to say about the job any more.
    `keep` is the job's directory: beginnings of lines survive the daemon there.
    """

    def __init__(self, directory: LogDirectory, source: Source, keep: Path) -> None:
        self._directory, self._source, self._keep = directory, source, keep
        self._log = directory.app(source.app_id)
        self._header = source.header()
        self._open: dict[int, tuple[Stream, LineSplitter, Unfinished]] = {}
        self._failing = False
        self._silent = False  # no `note` will come
        self.ended = asyncio.Event()

    def follow(self, stdout: int | None, stderr: int | None) -> None:
        """Start reading these descriptors; they stay the caller's, who closes them after `stop`."""
        loop = asyncio.get_running_loop()
        for descriptor, stream in ((stdout, Stream.STDOUT), (stderr, Stream.STDERR)):
            if descriptor is not None:
                unfinished = Unfinished(self._keep / f"unfinished.{stream.name.lower()}")
                self._open[descriptor] = (stream, LineSplitter(unfinished.take()), unfinished)
                loop.add_reader(descriptor, self._readable, descriptor)
        self._end_if_over()

    def note(self, text: str) -> None:
        """Add a line of the host's own to the job's init stream."""
        self._write(Stream.INIT_LOG, [text.encode()])

    def silence(self) -> None:
        """The host has noted all there was to note."""
        self._silent = True
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._silent and not self._open and not self.ended.is_set():
            self._log.close()  # other jobs of the app open it again
            self.ended.set()

    def stop(self) -> None:
        """Read no further; a last line without a newline is kept."""
        self.silence()
        for descriptor in list(self._open):
            self._finish(descriptor)

    def _readable(self, descriptor: int) -> None:
        stream, splitter, unfinished = self._open[descriptor]
        try:
            chunk = os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("output of a job cannot be read", extra={"job": self._source.job_id, "error": str(error)})
            chunk = b""
        if chunk:
            self._write(stream, splitter.feed(chunk))
            try:
                unfinished.keep(splitter.rest)
            except OSError as error:
                self._complain(error)
        else:
            self._finish(descriptor)

    def _finish(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        stream, splitter, unfinished = self._open.pop(descriptor)
        self._write(stream, splitter.finish())
        try:
            unfinished.keep(b"")
        except OSError as error:
            self._complain(error)
        unfinished.close()
        self._end_if_over()

    def _write(self, stream: Stream, lines: list[bytes]) -> None:
        if not lines:
            return
        try:
            self._log.append(record.encode_all(self._header, stream, self._directory.stamp(len(lines)), lines))
            self._failing = False
        except OSError as error:
            self._complain(error)
            return
        self._directory.appended(self._source.app_id)

    def _complain(self, error: OSError) -> None:
        """A full disk must not stop the job: its lines are lost, and that is said once."""
        if not self._failing:
            log.error("log lines lost", extra={"job": self._source.job_id, "error": str(error)})
        self._failing = True
