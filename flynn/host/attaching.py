"""Serving attachments: the server side of `flynn-attach/0`. spec/host.md section 6.

Output of a logged job is read back from the log, so a slow client delays nothing. Output of a tty or `disable_log` job
goes to its one attacher directly; a slow client then slows the job down, as a slow terminal does, and a client that
vanishes is replaced by a drain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flynn.host import attach, descriptors
from flynn.host.attach import ClientFrame, Data, Frame, Stream
from flynn.host.descriptors import Duplicate
from flynn.host.live import LiveJob, LiveJobs
from flynn.host.logs.files import LogDirectory, LogReader
from flynn.host.runtime.runtime import NotRunning
from flynn.http.connection import RawConnection
from flynn.types.host import META_APP, ActiveJob, AttachFlag, AttachReq, JobStatus

log = logging.getLogger(__name__)

EARLY_FRAMES = 64  # what a client may send before its job runs
FRAME_BYTES = 32 << 10  # of lines in one frame, which a line more may exceed
BATCH_FRAMES = 8

FindJob = Callable[[str], ActiveJob | None]


class _ClientGone(Exception):
    """The client closed the connection or broke it."""


class Attachments:
    """Serves all attachments of a host."""

    def __init__(self, find: FindJob, live: LiveJobs, logs: LogDirectory) -> None:
        self._find, self._live, self._logs = find, live, logs
        self._connections: set[RawConnection] = set()

    def hang_up(self) -> None:
        """Break all attachments off."""
        for connection in self._connections:
            connection.close()

    async def serve(self, connection: RawConnection, request: AttachReq) -> None:
        """Serve one attachment to its end. The caller closes the connection."""
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                client = _Client(connection)
                reading = group.create_task(client.read(), name=f"attachment of {request.job_id}")
                try:
                    await _Attachment(self._find, self._live, self._logs, client, request).run()
                except (_ClientGone, ConnectionError):
                    pass
                finally:
                    reading.cancel()
        finally:
            self._connections.discard(connection)


class _Client:
    """The other end: frames it sent, and whether it is still there."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._frames: asyncio.Queue[ClientFrame | None] = asyncio.Queue(EARLY_FRAMES)  # None: the last one was before
        self._over = False
        self.gone = asyncio.Event()  # nothing more will come from it: closed, broken, or it violated the protocol

    async def read(self) -> None:
        """Read frames until the client stops sending; one that fills the queue is not read until there is room."""
        try:
            while (frame := await attach.read_client_frame(self._connection)) is not None:
                await self._frames.put(frame)
        except attach.ProtocolViolation as error:
            log.info("attachment violates the protocol", extra={"error": str(error)})
        except EOFError:
            pass
        finally:
            self.gone.set()
        await self._frames.put(None)

    async def next(self) -> ClientFrame | None:
        """Return the next frame, None when no more will come."""
        frame = None if self._over else await self._frames.get()
        self._over = frame is None
        return frame

    @property
    def closed(self) -> bool:
        """Both sides of the connection are closed, as far as can be told without writing to it."""
        return self._connection.closing

    async def send(self, *frames: Frame) -> None:
        self._connection.write(b"".join(attach.encode(frame) for frame in frames))
        await self._connection.drain()


class _Attachment:
    """One attachment: what was asked for, and the job once it is there."""

    def __init__(self, find: FindJob, live: LiveJobs, logs: LogDirectory, client: _Client, request: AttachReq) -> None:
        self._find, self._live, self._logs = find, live, logs
        self._client, self._request = client, request
        self._job_id = request.job_id
        self._awaited: LiveJob | None = None  # whose start waits for us

    def _asked(self, flag: AttachFlag) -> bool:
        return bool(self._request.flags & flag)

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            self._in_place()

    def _in_place(self) -> None:
        """Nothing of the job's output can be missed any more, or is wanted any more."""
        if self._awaited is not None:
            self._awaited.arrived()
            self._awaited = None

    async def _run(self) -> None:
        known, live = self._find(self._job_id), self._live.get(self._job_id)
        if live is None and (known is None or known.status == JobStatus.STARTING):
            await self._client.send(attach.Waiting())
            outcome = await self._come_to_life()
            if isinstance(outcome, str):
                await self._client.send(attach.Failure(outcome))
                return
            live = outcome
        if live is not None:
            await self._attach(live)
        elif known is not None:
            await self._attach_to_ended(known)

    async def _come_to_life(self) -> LiveJob | str:
        """Wait for the job, as long as the client does."""
        waiting = self._live.wait_for(self._job_id)
        gone = asyncio.ensure_future(self._client.gone.wait())
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise _ClientGone
        finally:
            gone.cancel()
            if not waiting.cancel() and isinstance(outcome := waiting.result(), LiveJob):
                self._awaited = outcome

    async def _attach_to_ended(self, job: ActiveJob) -> None:
        config = job.job.config
        if job.status == JobStatus.FAILED:
            await self._client.send(attach.Failure(job.error or "unknown failure"))
        elif config.tty or self._asked(AttachFlag.STDIN):
            await self._client.send(attach.Failure(attach.JOB_NOT_RUNNING))
        elif config.disable_log:
            await self._client.send(attach.Attached(), *self._stream_ends())
        else:
            await self._client.send(attach.Attached())
            reader = self._logs.app(job.job.metadata.get(META_APP, "")).reader(history=True)
            try:
                if self._asked(AttachFlag.LOGS):
                    await self._send_lines(reader)
            finally:
                reader.close()
            await self._client.send(*self._stream_ends())

    async def _attach(self, live: LiveJob) -> None:
        config = live.job.config
        if config.tty and not self._asked(AttachFlag.STREAM) and not self._asked(AttachFlag.STDIN):
            # Who only looks for a log does not take the terminal over: there is none.
            await self._client.send(attach.Attached(), *self._stream_ends())
            return
        if live.raw and live.attached:
            await self._client.send(attach.Failure(attach.JOB_ATTACHED))
            return
        if self._asked(AttachFlag.STDIN) and not config.tty and live.stdin_taken:
            await self._client.send(attach.Failure("stdin is closed"))
            return
        if live.raw:
            live.attached = True
            live.drain.close()
        if config.tty:
            await self._attach_tty(live)
            return
        # Before anything is sent: not a line may be missed between the answer and the first look.
        reader = (
            None
            if live.raw
            else self._logs.app(live.job.metadata.get(META_APP, "")).reader(history=self._asked(AttachFlag.LOGS))
        )
        self._in_place()
        try:
            await self._client.send(attach.Attached())
            async with asyncio.TaskGroup() as group:
                commands = group.create_task(self._obey(live), name=f"commands to {self._job_id}")
                if reader is not None:
                    await self._follow_log(live, reader)
                else:
                    await self._copy_raw(live)
                commands.cancel()
        except* (ConnectionError, _ClientGone):
            raise _ClientGone from None
        finally:
            if reader is not None:
                reader.close()
            else:
                live.attached = False
                live.drain_output()
        await self._finish(live)

    async def _finish(self, live: LiveJob) -> None:
        if self._asked(AttachFlag.STREAM) or live.job.config.tty:
            await live.finished.wait()
            await self._client.send(self._verdict())
        else:
            await self._client.send(*self._stream_ends())

    def _verdict(self) -> Frame:
        job = self._find(self._job_id)
        if job is None or job.status == JobStatus.FAILED:
            return attach.Failure((job and job.error) or "unknown failure")
        return attach.Exit(job.exit_status or 0)

    def _stream_ends(self) -> list[Frame]:
        asked = ((AttachFlag.STDOUT, Stream.STDOUT), (AttachFlag.STDERR, Stream.STDERR))
        return [Data(stream, b"") for flag, stream in asked if self._asked(flag)]

    # Logged jobs

    async def _follow_log(self, live: LiveJob, reader: LogReader) -> None:
        assert live.capture is not None
        while True:
            ended = live.capture.ended.is_set()
            await self._send_lines(reader)
            if ended or not self._asked(AttachFlag.STREAM):
                return
            changed = asyncio.ensure_future(reader.changed.wait())
            over = asyncio.ensure_future(live.capture.ended.wait())
            gone = asyncio.ensure_future(self._client.gone.wait())
            try:
                await asyncio.wait((changed, over, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for waiting in (changed, over, gone):
                    waiting.cancel()
            if self._client.gone.is_set() and self._client_left():
                raise _ClientGone

    def _client_left(self) -> bool:
        """Tell whether one that sends nothing more does not listen either: who sends stdin may close just that side."""
        return not self._asked(AttachFlag.STDIN) or self._client.closed

    async def _send_lines(self, reader: LogReader) -> None:
        """Send what the log holds of this job by now. Lines that follow each other on one stream share a frame."""
        job_id = self._job_id.encode()
        wanted = [
            stream
            for flag, stream in (
                (AttachFlag.STDOUT, Stream.STDOUT),
                (AttachFlag.STDERR, Stream.STDERR),
                (AttachFlag.INIT_LOG, Stream.INIT_LOG),
            )
            if self._asked(flag)
        ]
        frames, lines, size = list[Frame](), list[bytes](), 0
        process, stream, ours = b"", None, False
        for line in reader.available():
            if line.process is not process or line.stream is not stream or size > FRAME_BYTES:
                if lines and stream is not None:
                    frames.append(Data(stream, b"".join(lines)))
                    lines, size = [], 0
                    if len(frames) >= BATCH_FRAMES:
                        await self._client.send(*frames)
                        frames = []
                process, stream = line.process, line.stream
                ours = stream in wanted and line.of_job(job_id)
            if ours:
                lines += (line.text, b"\n")
                size += len(line.text) + 1
        if lines and stream is not None:
            frames.append(Data(stream, b"".join(lines)))
        if frames:
            await self._client.send(*frames)

    # Raw output

    async def _copy_raw(self, live: LiveJob) -> None:
        container = live.container
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(self._notice_leaving(), name=f"reader of {self._job_id}")
            copying = []
            for flag, stream, descriptor in (
                (AttachFlag.STDOUT, Stream.STDOUT, container.stdout),
                (AttachFlag.STDERR, Stream.STDERR, container.stderr),
            ):
                if descriptor is None:
                    continue
                if self._asked(flag):
                    copying.append(
                        group.create_task(self._copy(descriptor, stream), name=f"output of {self._job_id}")
                    )  # fmt: skip
                else:
                    live.drain.add(descriptor)
            if copying:
                await asyncio.wait(copying)
            leaving.cancel()

    async def _notice_leaving(self) -> None:
        """Raise when the client leaves while the job prints nothing: somebody else may attach then."""
        await self._client.gone.wait()
        if self._client_left():
            raise _ClientGone

    async def _copy(self, descriptor: int, stream: Stream) -> None:
        with Duplicate(descriptor) as own:
            while chunk := await descriptors.read(own):
                await self._client.send(Data(stream, chunk))

    async def _attach_tty(self, live: LiveJob) -> None:
        """Connect a terminal; when either side ends, so does the job."""
        container = live.container
        assert container.pty is not None
        if self._request.height and self._request.width:
            await container.resize(self._request.height, self._request.width)
        self._in_place()
        try:
            await self._client.send(attach.Attached())
            async with asyncio.TaskGroup() as group:
                output = group.create_task(self._copy(container.pty, Stream.STDOUT), name=f"pty of {self._job_id}")
                typing = group.create_task(self._obey(live), name=f"keyboard of {self._job_id}")
                await asyncio.wait((output, typing), return_when=asyncio.FIRST_COMPLETED)
                live.stop()
                typing.cancel()
        except* (ConnectionError, _ClientGone):
            live.stop()
            raise _ClientGone from None
        finally:
            live.attached = False
        await self._finish(live)

    # What the client sends

    async def _obey(self, live: LiveJob) -> None:
        """Carry out the client's frames until it stops sending; its stdin then ends for the job as well."""
        config, container = live.job.config, live.container
        target = container.pty if config.tty else container.stdin
        stdin = Duplicate(target) if self._asked(AttachFlag.STDIN) and target is not None else None
        if stdin is not None and not config.tty:
            live.stdin_taken = True
        try:
            while (frame := await self._client.next()) is not None:
                match frame:
                    case Data(_, b"") if stdin is not None:
                        if config.tty:
                            return  # the terminal is closed
                        stdin.close()
                        stdin = None
                        await container.close_stdin()
                    case Data(_, data) if stdin is not None:
                        if not await descriptors.write(stdin.number, data):
                            stdin.close()
                            stdin = None  # the job has closed it; its output goes on
                    case attach.Signal(number) if 0 < number < 65:
                        await _ignoring_ended(container.signal(number))
                    case attach.Resize(height, width) if config.tty:
                        await _ignoring_ended(container.resize(height, width))
                    case Data() if self._asked(AttachFlag.STDIN):
                        pass  # more input for a job that reads none any more
                    case _:
                        log.info("attachment sent what it may not", extra={"job": self._job_id, "frame": repr(frame)})
                        return
        finally:
            if stdin is not None:
                stdin.close()
                if not config.tty:
                    await _ignoring_ended(container.close_stdin())


async def _ignoring_ended(command: Awaitable[None]) -> None:
    """A signal or a new size for a job that has just ended is no error of the client's."""
    try:
        await command
    except NotRunning:
        pass
