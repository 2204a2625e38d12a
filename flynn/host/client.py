"""Typed client of one host's API: jobs, events, attachments, volumes, sinks, network configuration.

One `HostClient` speaks to one host; who finds hosts (service `flynn-host` in discoverd) and which identity is used
is the caller's business and is settled in the `HttpClient` handed in. spec/host.md sections 3, 6 and 12.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

from flynn.aio.backoff import Backoff, retrying
from flynn.host import attach
from flynn.http.client import HttpClient, Position
from flynn.http.connection import RawConnection
from flynn.types.errors import Unreachable
from flynn.types.host import (
    ActiveJob,
    AttachFlag,
    AttachReq,
    DiscoverdConfig,
    HostCommand,
    HostJob,
    HostStatus,
    ImagePullInfo,
    JobEvent,
    JobStats,
    NetworkConfig,
    ResourceCheck,
    ResourceCheckPort,
)
from flynn.types.sink import Sink, SinkInfo
from flynn.types.volume import ProviderSpec, PullCoordinate, VolumeEvent, VolumeInfo, VolumeRequest

DEFAULT_PROVIDER = "default"
STOP_SECONDS = 60.0  # a job gets 30 s between SIGTERM and SIGKILL, and its cleaning up takes a moment
PULL_SECONDS = 2 * 3600.0  # a large volume over a slow line
DEREGISTER_SECONDS = 15.0
RESUME_SECONDS = 20.0
RESUME = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=2))
INSTALL_SECONDS = 900.0  # some 40 MB, and an installation
UPDATE_SECONDS = 45.0  # a new program has 30 s to prove itself


class Attachment:
    """One open attachment. The first state byte has been read; frames follow.

    `waiting` tells whether the host did not know the job yet when asked: then add the job, and `await ready()`.
    """

    def __init__(self, connection: RawConnection, flags: int, *, waiting: bool) -> None:
        self.connection = connection  # raw, for those who pipe frames blindly once `ready`
        self.waiting = waiting
        asked = ((AttachFlag.STDOUT, attach.Stream.STDOUT), (AttachFlag.STDERR, attach.Stream.STDERR))
        self._open = {stream for flag, stream in asked if flags & flag}

    async def ready(self) -> None:
        """Return once the job is attached; data frames follow.

        Raises:
            AttachRefused: the job failed, is not running, or is attached by someone else.
        """
        if not self.waiting:
            return
        match await attach.read_server_frame(self.connection):
            case attach.Attached():
                self.waiting = False
            case attach.Failure(message):
                raise attach.AttachRefused(message)
            case None:
                raise attach.AttachRefused("the host closed the connection")
            case other:
                raise attach.ProtocolViolation(f"{other} before the job was attached")

    async def frames(self) -> AsyncIterator[attach.Data | attach.Exit | attach.Failure]:
        """Iterate over data, then `Exit` or `Failure` as last frame, or the ends of the streams asked for.

        Stops at the last frame, not at the end of the connection: closing it is up to us.
        """
        await self.ready()
        async for frame in attach.server_frames(self.connection):
            match frame:
                case attach.Data(stream, data):
                    yield frame
                    if not data:
                        self._open.discard(stream)
                        if not self._open:
                            return
                case attach.Exit() | attach.Failure():
                    yield frame
                    return
                case attach.Attached() | attach.Waiting():
                    raise attach.ProtocolViolation(f"{frame} in the middle of an attachment")

    async def send(self, frame: attach.ClientFrame) -> None:
        """Send stdin (empty data closes it), a signal, or a terminal size."""
        self.connection.write(attach.encode(frame))
        await self.connection.drain()


class HostClient:
    """The API of one host."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def status(self) -> HostStatus:
        """Return who the host is and what it knows of discoverd and the network."""
        return await self._http.get("/host/status", answer=HostStatus)

    # Jobs

    async def jobs(self, *, active: bool = False) -> dict[str, ActiveJob]:
        """Return the host's jobs by id; with `active` only starting and running ones."""
        params = {"active": "true"} if active else {}
        return await self._http.get("/host/jobs", answer=dict[str, ActiveJob], params=params)

    async def job(self, job_id: str) -> ActiveJob:
        """Return one job, also one no longer listed. Raises `NotFound`."""
        return await self._http.get(f"/host/jobs/{job_id}", answer=ActiveJob)

    async def stats(self, job_id: str) -> JobStats:
        """Measure a job. Raises `NotFound`, or `Conflict` for one that is down or has no container yet."""
        return await self._http.get(f"/host/jobs/{job_id}/stats", answer=JobStats)

    async def add_job(self, job: HostJob) -> None:
        """Have the host run `job`; returns when it is recorded, before it runs. Everything later is an event.

        Raises:
            Conflict: the id is taken, or a volume is in use.
            RateLimited: too many jobs are starting; try again.
        """
        await self._http.put(f"/host/jobs/{job.id}", job)

    async def stop_job(self, job_id: str) -> None:
        """Stop a job: SIGTERM, 30 s, SIGKILL. Returns when it is down. Raises `NotFound` for an unknown job."""
        await self._http.call("DELETE", f"/host/jobs/{job_id}", timeout=STOP_SECONDS)

    async def signal_job(self, job_id: str, number: int) -> None:
        """Send a signal to a job's main process."""
        await self._http.put(f"/host/jobs/{job_id}/signal/{number}", None)

    async def deregister_job(self, job_id: str) -> None:
        """Take a job's services out of discoverd now; the job keeps running."""
        await self._http.put(f"/host/jobs/{job_id}/discoverd-deregister", None)

    def events(self, job_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Follow the events of all jobs, or of one (which need not exist yet), in order, over one connection.

        There is no replay; see `following` for who must not miss one.
        """
        return self._http.events(_jobs_path(job_id), JobEvent)

    def subscribed(self, job_id: str | None = None) -> AbstractAsyncContextManager[AsyncIterator[JobEvent]]:
        """Like `events`, but the subscription stands when the block is entered: subscribe, then list or add jobs."""
        return self._http.subscribed(_jobs_path(job_id), JobEvent)

    @asynccontextmanager
    async def following(self, job_id: str | None = None) -> AsyncIterator[AsyncIterator[JobEvent]]:
        """Like `subscribed`, and a connection that breaks is made again without losing or doubling an event.

        Raises:
            Unreachable: the host has not answered for `RESUME_SECONDS`.
            PreconditionFailed: what happened is not known any more (the daemon is another one): list the jobs.
        """
        position, path = Position(), _jobs_path(job_id)
        first = self._http.subscribed(path, JobEvent, params={"numbered": "true"}, position=position)
        async with AsyncExitStack() as stack:
            stream = await stack.enter_async_context(first)

            async def events() -> AsyncIterator[JobEvent]:
                current = stream
                while True:
                    with suppress(Unreachable):
                        async for event in current:
                            yield event
                    await stack.aclose()
                    current = await retrying(
                        lambda: stack.enter_async_context(self._http.subscribed(path, JobEvent, position=position)),
                        on=Unreachable, policy=RESUME, within=timedelta(seconds=RESUME_SECONDS),
                    )  # fmt: skip

            yield events()

    @asynccontextmanager
    async def attach(self, request: AttachReq) -> AsyncIterator[Attachment]:
        """Attach to a job that exists or is about to be added.

        Raises:
            AttachRefused: the job exists but cannot be attached.
        """
        connection = await self._http.upgrade("/attach", request, attach.PROTOCOL)
        try:
            match await attach.read_server_frame(connection):
                case attach.Attached():
                    yield Attachment(connection, request.flags, waiting=False)
                case attach.Waiting():
                    yield Attachment(connection, request.flags, waiting=True)
                case attach.Failure(message):
                    raise attach.AttachRefused(message)
                case None:
                    raise attach.AttachRefused("the host closed the connection")
                case other:
                    raise attach.ProtocolViolation(f"{other} before the job was attached")
        finally:
            connection.close()

    # Configuration

    async def configure_discoverd(self, config: DiscoverdConfig) -> None:
        """Tell the host where discoverd and its DNS answer."""
        await self._http.post("/host/discoverd", config)

    async def configure_network(self, config: NetworkConfig) -> None:
        """Give the host its subnet; returns once the bridge exists."""
        await self._http.post("/host/network", config)

    async def set_tags(self, tags: Mapping[str, str]) -> None:
        """Merge tags into the host's; an empty value deletes one."""
        await self._http.post("/host/tags", dict(tags))

    async def drain(self, *, draining: bool = True) -> None:
        """Get no new jobs from the scheduler (and give up the platform's own), or get them again."""
        await self._http.post("/host/drain", {"draining": draining})

    async def update(self, command: HostCommand) -> HostCommand:
        """Have another program take the daemon's place; returns once it has proved itself, a moment before it does.

        The status tells afterwards how it went. Raises `PreconditionFailed` when the program does not prove itself.
        """
        answer = await self._http.call("POST", "/host/update", command, answer=HostCommand, timeout=UPDATE_SECONDS)
        assert answer is not None
        return answer

    async def resource_check(self, ports: Sequence[ResourceCheckPort]) -> None:
        """Check that ports are free on the host. Raises `Conflict` whose detail lists those that are not."""
        await self._http.post("/host/resource-check", ResourceCheck(ports=list(ports)))

    # Volumes

    async def pull_images(self, repository: str, version: str = "") -> AsyncIterator[ImagePullInfo]:
        """Have a release on the host; yields each layer and image that is there. Raises `ApiError` if it is refused."""
        params = {"repository": repository, "version": version}
        pulling = self._http.subscribed("/host/pull/images", ImagePullInfo, method="POST", params=params)
        async with pulling as pulled:
            async for item in pulled:
                yield item

    async def pull_program(self, repository: str, version: str = "") -> dict[str, str]:
        """Have the program of a release on the host; returns the paths of its commands there. Raises `ApiError`."""
        params = {"repository": repository, "version": version}
        answer = await self._http.call(
            "POST", "/host/pull/binaries", answer=dict[str, str], params=params, timeout=INSTALL_SECONDS
        )
        assert answer is not None
        return answer

    async def create_volume(self, request: VolumeRequest, *, provider: str = DEFAULT_PROVIDER) -> VolumeInfo:
        """Create a data volume; an empty id in `request` is filled in."""
        return await self._http.post(f"/storage/providers/{provider}/volumes", request, answer=VolumeInfo)

    async def create_provider(self, spec: ProviderSpec) -> ProviderSpec:
        """Add a volume provider."""
        return await self._http.post("/storage/providers", spec, answer=ProviderSpec)

    async def volumes(self) -> list[VolumeInfo]:
        """Return all volumes of the host."""
        return await self._http.get("/storage/volumes", answer=list[VolumeInfo])

    async def volume(self, volume_id: str) -> VolumeInfo:
        """Return one volume. Raises `NotFound`."""
        return await self._http.get(f"/storage/volumes/{volume_id}", answer=VolumeInfo)

    def volume_events(self) -> AsyncIterator[VolumeEvent]:
        """Follow creations and destructions of volumes, without replay."""
        return self._http.events("/storage/volumes", VolumeEvent)

    async def destroy_volume(self, volume_id: str) -> None:
        """Destroy a volume and its data. Raises `NotFound`, or `Conflict` while a job uses it."""
        await self._http.delete(f"/storage/volumes/{volume_id}")

    async def snapshot_volume(self, volume_id: str) -> VolumeInfo:
        """Take a read-only snapshot, itself a volume."""
        return await self._http.put(f"/storage/volumes/{volume_id}/snapshot", None, answer=VolumeInfo)

    async def clone_volume(self, snapshot_id: str, request: VolumeRequest) -> VolumeInfo:
        """Make a writable volume that begins as a snapshot. Raises `ValidationError` for an ordinary volume."""
        return await self._http.post(f"/storage/volumes/{snapshot_id}/clone", request, answer=VolumeInfo)

    async def pull_snapshot(self, volume_id: str, source: PullCoordinate) -> VolumeInfo:
        """Receive a snapshot of another host into a volume of this one."""
        path = f"/storage/volumes/{volume_id}/pull_snapshot"
        pulled = await self._http.call("POST", path, source, answer=VolumeInfo, timeout=PULL_SECONDS)
        assert pulled is not None
        return pulled

    # Sinks

    async def sinks(self) -> list[Sink]:
        """Return the host's log sinks."""
        return await self._http.get("/sinks", answer=list[Sink])

    async def put_sink(self, sink: SinkInfo) -> None:
        """Create or change a log sink."""
        await self._http.put(f"/sinks/{sink.id}", sink, answer=dict[str, Any])

    async def delete_sink(self, sink_id: str) -> None:
        """Remove a log sink. Raises `NotFound`."""
        await self._http.delete(f"/sinks/{sink_id}")


def _jobs_path(job_id: str | None) -> str:
    return "/host/jobs" if job_id is None else f"/host/jobs/{job_id}"
