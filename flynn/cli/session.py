"""A job attached to this terminal: bytes both ways, signals, the terminal's size, and the job's exit status.

The frames are those of `flynn.host.attach`. With a terminal on both sides it is put into raw mode, so that every key
goes to the job; it is restored however this ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from flynn.cli.errors import CliError
from flynn.host import attach

if TYPE_CHECKING:
    from flynn.controller.client import Controller
    from flynn.http.connection import RawConnection
    from flynn.types.job import NewJob

STDIN, STDOUT, STDERR = 0, 1, 2
KILL_AFTER = 10.0  # seconds between the user's signal and SIGKILL
CHUNK = 32 * 1024
STATUS_MASK = 0xFF


def with_terminal(job: NewJob, environ: Mapping[str, str]) -> NewJob:
    """The job with a terminal of our size, if we have one on both standard input and output."""
    from flynn.types.codec import replace

    if not (os.isatty(STDIN) and os.isatty(STDOUT)):
        return job
    columns, lines = os.get_terminal_size(STDOUT)
    env = {**job.env, "COLUMNS": str(columns), "LINES": str(lines), "TERM": environ.get("TERM", "")}
    return replace(job, tty=True, tty_columns=columns, tty_lines=lines, env=env)


async def attached(
    controller: Controller, app: str, job: NewJob, *, source: int | None = None, target: int | None = None
) -> int:
    """Start the job and stay with it to its end; the exit status.

    Args:
        source: descriptor to read its standard input from; default our own.
        target: descriptor for its standard output; default our own.
    """
    source, target = STDIN if source is None else source, STDOUT if target is None else target
    async with controller.run_job_attached(app, job) as connection:
        sender = _Sender(connection)
        with _raw_terminal() if job.tty else _as_it_is():
            async with _signals(sender, tty=job.tty), _feeding(sender, source):
                return await _receive(connection, target)


async def _receive(connection: RawConnection, target: int) -> int:
    outputs = {attach.Stream.STDOUT: target, attach.Stream.STDERR: STDERR, attach.Stream.INIT_LOG: STDERR}
    try:
        while True:
            match await attach.read_server_frame(connection):
                case attach.Data(stream, data) if data and stream in outputs:
                    await _write(outputs[stream], data)
                case attach.Exit(status):
                    return status & STATUS_MASK
                case attach.Failure(message):
                    raise CliError(message)
                case None:
                    raise CliError("EOF: the connection to the job was lost")
                case _:
                    continue
    except EOFError:
        raise CliError("EOF: the connection to the job was lost") from None
    except attach.ProtocolViolation as error:
        raise CliError(str(error)) from error


async def _write(descriptor: int, data: bytes) -> None:
    """All of it, however slow the reader: in a thread, so that signals still get through meanwhile."""

    def write() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    await asyncio.to_thread(write)


class _Sender:
    """What goes to the job. Once the connection is gone nothing is sent; the receiving side reports that."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection

    def send(self, frame: attach.ClientFrame) -> None:
        self._connection.write(attach.encode(frame))

    async def flushed(self) -> bool:
        try:
            await self._connection.drain()
        except ConnectionError:
            return False
        return True


@asynccontextmanager
async def _feeding(sender: _Sender, source: int) -> AsyncIterator[None]:
    """Copy the source to the job's standard input in the background, then its end."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue(4)

    async def feed() -> None:
        while True:
            data = await chunks.get()
            sender.send(attach.Data(attach.Stream.STDIN, data))
            if not await sender.flushed() or not data:
                return

    def read() -> None:
        # A thread, since files and some terminals cannot be polled. It ends with its source or with the process.
        while True:
            try:
                data = os.read(source, CHUNK)
            except OSError:
                data = b""
            try:
                asyncio.run_coroutine_threadsafe(chunks.put(data), loop).result()
            except (RuntimeError, asyncio.CancelledError):
                return
            if not data:
                return

    import threading

    threading.Thread(target=read, name="standard input", daemon=True).start()
    async with asyncio.TaskGroup() as group:
        feeder = group.create_task(feed(), name="feed standard input")
        try:
            yield
        finally:
            feeder.cancel()


@asynccontextmanager
async def _signals(sender: _Sender, *, tty: bool) -> AsyncIterator[None]:
    """Hand the user's signals to the job: the first as it is, SIGKILL some seconds later; resizes as they come."""
    loop = asyncio.get_running_loop()
    killer: asyncio.TimerHandle | None = None

    def forward(number: int) -> None:
        nonlocal killer
        if killer is None:
            sender.send(attach.Signal(number))
            killer = loop.call_later(KILL_AFTER, sender.send, attach.Signal(signal.SIGKILL))

    def resized() -> None:
        columns, lines = os.get_terminal_size(STDOUT)
        sender.send(attach.Resize(lines, columns))
        sender.send(attach.Signal(signal.SIGWINCH))

    handled = [signal.SIGINT, signal.SIGTERM]
    for number in handled:
        loop.add_signal_handler(number, forward, number)
    if tty:
        loop.add_signal_handler(signal.SIGWINCH, resized)
        handled.append(signal.SIGWINCH)
    try:
        yield
    finally:
        if killer is not None:
            killer.cancel()
        for number in handled:
            loop.remove_signal_handler(number)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(STDIN)
    try:
        tty.setraw(STDIN)
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


@contextmanager
def _as_it_is() -> Iterator[None]:
    sys.stdout.flush()
    yield
