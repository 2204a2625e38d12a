"""The host's HTTP API: a table of endpoints over the parts of the daemon. spec/host.md sections 3, 12 and 13."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar

from flynn.aio.broadcast import Broadcast, Closed, Overflowed
from flynn.host.attaching import Attachments
from flynn.host.jobs.book import JobBook
from flynn.host.jobs.events import JobEvents
from flynn.host.jobs.fence import Fence
from flynn.host.joining import Authority, Joining, JoinRequest, TokenCreated, TokenRequest, Welcome
from flynn.host.logs.sinks import Sinks
from flynn.host.node import Node
from flynn.host.releases import Releases
from flynn.host.runner import JobRunner
from flynn.host.volumes.book import VolumeBook
from flynn.http import sse
from flynn.http.server import Api, EventStream, Raw, Request, Streaming
from flynn.identity.access import ANYONE, INSIDERS, access
from flynn.types.codec import Wire, always, decode, replace
from flynn.types.errors import ApiError, Conflict, ObjectExists, ServiceUnavailable, ValidationError
from flynn.types.host import (
    META_APP,
    TERM_HEADER,
    ActiveJob,
    AttachReq,
    DiscoverdConfig,
    HostCommand,
    HostJob,
    HostStatus,
    JobStats,
    NetworkConfig,
    ResourceCheck,
    ResourceCheckPort,
)
from flynn.types.sink import Sink, SinkInfo
from flynn.types.status import Status
from flynn.types.volume import ProviderSpec, PullCoordinate, VolumeInfo, VolumeRequest

T = TypeVar("T")

OPERATORS = access("operator", "host", "app:controller")
JOB_MAKERS = access("operator", "host", "app:controller", "app:gitreceive", "app:taffy")
READERS = access("operator", "host", "app:*")  # who we are is no secret inside the platform
NETWORKERS = access("operator", "host", "app:flannel")
DIRECTORIES = access("operator", "host", "app:discoverd")
HOSTS = access("operator", "host")

MAX_JOIN_BYTES = 4096
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
EVENTS_BEHIND = 5000  # a reader this far behind is cut off; it relists when it comes back


class Drain(Wire):
    """`POST /host/drain`."""

    draining: bool = always(True)


class HostApi:
    """Handlers that decode, ask the part concerned, and return its answer."""

    def __init__(
        self,
        *,
        node: Node,
        book: JobBook,
        runner: JobRunner,
        attachments: Attachments,
        volumes: VolumeBook,
        sinks: Sinks,
        joining: Joining,
        releases: Releases,
        update: Callable[[HostCommand], Awaitable[HostCommand]],
    ) -> None:
        self._node, self._book, self._runner = node, book, runner
        self._attachments, self._volumes, self._sinks = attachments, volumes, sinks
        self._joining, self._releases, self._update = joining, releases, update
        self._fence = Fence()

    def api(self) -> Api:
        """Return the table of endpoints."""
        api = Api("flynn-host", status=self._health, redirect_slash=True)
        api.route("GET", "/metrics", self._metrics, allow=INSIDERS)
        api.route("GET", "/host/jobs", self._fenced(self._jobs), allow=JOB_MAKERS)
        api.route("GET", "/host/jobs/{id}", self._job, allow=JOB_MAKERS)
        api.route("PUT", "/host/jobs/{id}", self._fenced(self._add_job), allow=JOB_MAKERS)
        api.route("DELETE", "/host/jobs/{id}", self._fenced(self._stop_job), allow=JOB_MAKERS)
        api.route("PUT", "/host/jobs/{id}/signal/{signal}", self._signal_job, allow=JOB_MAKERS)
        api.route("PUT", "/host/jobs/{id}/discoverd-deregister", self._fenced(self._deregister_job), allow=OPERATORS)
        api.route("GET", "/host/jobs/{id}/stats", self._job_stats, allow=JOB_MAKERS)
        api.route("POST", "/attach", self._attach, allow=JOB_MAKERS)
        api.route("GET", "/host/status", self._status, allow=READERS)
        api.route("POST", "/host/discoverd", self._configure_discoverd, allow=DIRECTORIES)
        api.route("POST", "/host/network", self._configure_network, allow=NETWORKERS)
        api.route("POST", "/host/resource-check", self._resource_check, allow=OPERATORS)
        api.route("POST", "/host/tags", self._set_tags, allow=OPERATORS)
        api.route("POST", "/host/update", self._update_daemon, allow=HOSTS)
        api.route("POST", "/host/pull/images", self._pull_images, allow=HOSTS)
        api.route("POST", "/host/pull/binaries", self._pull_binaries, allow=HOSTS)
        api.route("POST", "/host/drain", self._drain, allow=HOSTS)
        api.route("POST", "/host/tokens", self._create_token, allow=HOSTS)
        api.route("GET", "/host/ca", self._authority, allow=ANYONE)
        api.route("POST", "/host/join", self._join, allow=ANYONE, max_body_bytes=MAX_JOIN_BYTES)  # the secret decides
        api.route("POST", "/storage/providers", self._create_provider, allow=HOSTS)
        api.route("POST", "/storage/providers/{provider}/volumes", self._fenced(self._create_volume), allow=JOB_MAKERS)
        api.route("GET", "/storage/volumes", self._list_volumes, allow=JOB_MAKERS)
        api.route("GET", "/storage/volumes/{id}", self._volume, allow=JOB_MAKERS)
        api.route("DELETE", "/storage/volumes/{id}", self._destroy_volume, allow=JOB_MAKERS)
        api.route("PUT", "/storage/volumes/{id}/snapshot", self._snapshot_volume, allow=OPERATORS)
        api.route("POST", "/storage/volumes/{id}/clone", self._clone_volume, allow=OPERATORS)
        api.route("POST", "/storage/volumes/{id}/pull_snapshot", self._pull_snapshot, allow=OPERATORS)
        api.route("GET", "/storage/volumes/{id}/send", self._send_volume, allow=HOSTS)
        api.route("GET", "/sinks", self._list_sinks, allow=OPERATORS)
        api.route("PUT", "/sinks/{id}", self._put_sink, allow=OPERATORS)
        api.route("DELETE", "/sinks/{id}", self._delete_sink, allow=OPERATORS)
        return api

    def hang_up(self) -> None:
        """End all streams and attachments: the daemon is leaving, and the listener would wait for them."""
        self._book.events.close()
        self._volumes.events.close()
        self._attachments.hang_up()

    def _fenced(self, handler: Callable[[Request], Awaitable[T]]) -> Callable[[Request], Awaitable[T]]:
        """Ask first whether the scheduler that sends the request still leads; others carry no term."""

        async def handle(request: Request) -> T:
            term = request.header(TERM_HEADER)
            if term.isdecimal():
                self._fence.admit(int(term), time.monotonic())
            return await handler(request)

        return handle

    # Jobs

    async def _jobs(self, request: Request) -> dict[str, ActiveJob] | EventStream:
        if request.accepts_events:
            return await _job_events(request, self._book.events)
        active, app = request.query("active") == "true", request.query("app")
        return {
            job_id: job for job_id, job in self._book.jobs.items()
            if not (active and job.status.down) and (not app or job.job.metadata.get(META_APP) == app)
        }  # fmt: skip

    async def _job(self, request: Request) -> ActiveJob | EventStream:
        job_id = request.path("id")
        if request.accepts_events:
            return await _job_events(request, self._book.events, of_job=job_id)
        return self._book.find(job_id)

    async def _add_job(self, request: Request) -> dict[str, Any]:
        job = await request.body(HostJob)
        await self._runner.add(job if job.id else replace(job, id=request.path("id")))
        return {}

    async def _stop_job(self, request: Request) -> None:
        await self._runner.stop(request.path("id"))

    async def _job_stats(self, request: Request) -> JobStats:
        return self._runner.stats(request.path("id"))

    async def _signal_job(self, request: Request) -> None:
        if _INTEGER.fullmatch(number := request.path("signal")) is None:  # `int` takes other scripts' digits, too
            raise ValidationError("", "sig must be an integer", {"field": "sig"})
        await self._runner.signal(request.path("id"), int(number))

    async def _deregister_job(self, request: Request) -> None:
        await self._runner.deregister(request.path("id"))

    async def _attach(self, request: Request) -> Raw | None:
        try:
            wanted = await request.body(AttachReq, any_content_type=True)
        except ApiError:
            return Raw(b"invalid JSON\n", "text/plain; charset=utf-8", 400)
        connection = await request.upgrade("flynn-attach/0")
        async with connection:
            await self._attachments.serve(connection, wanted)
        return None

    # The host

    async def _health(self) -> Status:
        return self._node.health()

    async def _metrics(self, request: Request) -> Raw:
        from prometheus_client import generate_latest  # Costs memory, and most hosts are never scraped.

        ours = self._node.metrics() + self._runner.exposition()
        return Raw(generate_latest() + ours.encode(), "text/plain; version=0.0.4")

    async def _status(self, request: Request) -> HostStatus:
        return self._node.status()

    async def _configure_discoverd(self, request: Request) -> None:
        await self._node.configure_discoverd(await request.body(DiscoverdConfig))

    async def _configure_network(self, request: Request) -> None:
        await self._node.configure_network(await request.body(NetworkConfig))

    async def _resource_check(self, request: Request) -> dict[str, Any]:
        ports = (await request.body(ResourceCheck)).ports
        for position, port in enumerate(ports):
            if not 0 < port.port < 65536:
                raise ValidationError(f"ports[{position}].port", f"cannot be {port.port}")
            if port.proto not in ("tcp", "udp", ""):
                raise ValidationError(f"ports[{position}].proto", "must be tcp or udp")
        conflicts = [port for port in ports if not is_free(port)]
        if conflicts:
            raise Conflict("Conflicting resources found", {"ports": conflicts})
        return {}

    async def _set_tags(self, request: Request) -> None:
        await self._node.set_tags(await request.body(dict[str, str]))

    async def _update_daemon(self, request: Request) -> HostCommand:
        return await self._update(await request.body(HostCommand))

    async def _drain(self, request: Request) -> None:
        await self._node.set_draining((await request.body(Drain)).draining)

    # Joining

    async def _create_token(self, request: Request) -> TokenCreated:
        return await self._joining.invite(await request.body(TokenRequest))

    async def _authority(self, request: Request) -> Authority:
        return self._joining.authority

    async def _join(self, request: Request) -> Welcome:
        wanted = await request.body(JoinRequest)
        return await self._joining.welcome(wanted, request.other_end, self._node.hosts)

    async def _pull_images(self, request: Request) -> EventStream:
        # The body, the asker's own idea of whom to trust, is not looked at: that is this host's affair.
        return EventStream(self._releases.pull(*_release(request)))

    async def _pull_binaries(self, request: Request) -> dict[str, str]:
        # Nor where the asker wants to have it: programs go beside the one that runs, links are moved by an update.
        return await self._releases.pull_program(*_release(request))

    # Volumes

    async def _create_provider(self, request: Request) -> ProviderSpec:
        spec = await request.body(ProviderSpec)
        if not spec.kind:
            raise ValidationError("kind", "must not be blank")
        if spec.kind != "zfs":
            raise ValidationError("kind", f'"{spec.kind}" is not known')
        raise ObjectExists("this host has its one provider: default")

    async def _create_volume(self, request: Request) -> VolumeInfo:
        return await self._volumes.create(request.path("provider"), await _volume_request(request))

    async def _list_volumes(self, request: Request) -> list[VolumeInfo] | EventStream:
        if request.accepts_events:
            return await _stream(self._volumes.events)
        return self._volumes.all()

    async def _volume(self, request: Request) -> VolumeInfo:
        return self._volumes.get(request.path("id"))

    async def _destroy_volume(self, request: Request) -> None:
        await self._volumes.destroy(request.path("id"))

    async def _snapshot_volume(self, request: Request) -> VolumeInfo:
        return await self._volumes.snapshot(request.path("id"))

    async def _clone_volume(self, request: Request) -> VolumeInfo:
        return await self._volumes.clone(request.path("id"), await _volume_request(request))

    async def _pull_snapshot(self, request: Request) -> VolumeInfo:
        source = await request.body(PullCoordinate)
        return await self._node.pull_snapshot(request.path("id"), source)

    async def _send_volume(self, request: Request) -> Streaming:
        kind = "application/vnd.zfs.snapshot-stream"
        if kind not in request.header("Accept"):
            raise ValidationError("", f"must be able to accept {kind}")
        haves = await request.body(list[dict[str, str]])
        ids = [have["snap_id"] for have in haves if "snap_id" in have]
        chunks = self._volumes.send(request.path("id"), ids)
        # The first piece before the headers: what cannot be sent at all is refused, not a stream that breaks off.
        first = await anext(chunks, b"")
        return Streaming(_resumed(first, chunks), kind)

    # Sinks

    async def _list_sinks(self, request: Request) -> list[Sink]:
        return self._sinks.all()

    async def _put_sink(self, request: Request) -> SinkInfo:
        sink = await request.body(SinkInfo)
        return await self._sinks.put(replace(sink, id=sink.id or request.path("id")))

    async def _delete_sink(self, request: Request) -> dict[str, Any]:
        await self._sinks.delete(request.path("id"))
        return {}


async def _volume_request(request: Request) -> VolumeRequest:
    """The body, of any content type; none is fine."""
    raw = await request.raw()
    return decode(raw, VolumeRequest) if raw.strip() else VolumeRequest()


def _release(request: Request) -> tuple[str, str]:
    """Return the repository and the version (empty: what it recommends) that a request names."""
    repository, version = request.query("repository"), request.query("version")
    if not repository.strip() or not repository.isprintable():
        raise ValidationError("repository", "must be set to a directory or a URL")
    if re.fullmatch(r"[A-Za-z0-9._-]*", version) is None:
        raise ValidationError("version", f"cannot be {version!r}")
    return repository, version


def is_free(port: ResourceCheckPort) -> bool:
    """Tell whether nobody listens on a port of this host."""
    kind = socket.SOCK_DGRAM if port.proto == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port.port))
            if kind is socket.SOCK_STREAM:
                probe.listen(1)
        except (OSError, OverflowError):
            return False
    return True


async def _resumed(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


async def _stream(events: Broadcast[Any]) -> EventStream:
    """Subscribe now, so that nothing is missed between the answer's headers and its first item."""
    stack = AsyncExitStack()
    subscription = await stack.enter_async_context(events.subscribe(EVENTS_BEHIND))

    async def items() -> AsyncIterator[Any]:
        async with stack, _until_closed():
            async for event in subscription:
                yield event

    return EventStream(items())


async def _job_events(request: Request, events: JobEvents, of_job: str | None = None) -> EventStream:
    """Events of all jobs or of one, as they come.

    Clients of the original get what the original sent. Who asks with `numbered=true` gets the number of each event in
    an `id:` line, and who comes back with `Last-Event-ID` what he has missed. (The original's client always sends 0,
    which means nothing.) The answer's own `Last-Event-ID` says where the stream begins.
    """
    asked = request.header("Last-Event-ID").strip()
    seen = int(asked) if re.fullmatch(r"[0-9]{1,18}", asked) else 0
    numbered = bool(seen) or request.query("numbered") == "true"
    missed = events.after(seen) if seen else []
    begin = seen or events.last
    stack = AsyncExitStack()
    subscription = await stack.enter_async_context(events.subscribe(EVENTS_BEHIND))

    async def items() -> AsyncIterator[Any]:
        async with stack, _until_closed():
            for past in missed:
                if of_job is None or past.event.job_id == of_job:
                    yield sse.message(past.event, past.number)
            async for new in subscription:
                if of_job is None or new.event.job_id == of_job:
                    yield sse.message(new.event, new.number if numbered else None)

    return EventStream(items(), headers={"Last-Event-ID": str(begin)})


@asynccontextmanager
async def _until_closed() -> AsyncIterator[None]:
    """End a stream in order when the daemon leaves, and with an error when its reader is too slow."""
    try:
        yield
    except Overflowed as error:
        raise ServiceUnavailable(f"the event stream fell behind: {error}") from error
    except Closed:
        return  # streams end before the listener waits for them
