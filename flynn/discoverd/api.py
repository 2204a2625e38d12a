"""The HTTP surface of discoverd: paths, answers and streams as spec/discoverd sections 3 and 4 have them.

Reads and streams are answered by every member from its own state. Writes are for the leader: another member sends the
caller there (307), or says 503 "try again" while nobody leads. An operator on loopback could not go there, having no
certificate, so for him the member asks the leader itself.

A node that is no member observes: it has the whole directory and answers reads like a member, names included. A node
that has not heard from the leader for a while goes on with what it knows and says so: `Discoverd-Stale: <seconds>`.

Deviations, on purpose: who speaks here is known (certificate, or the host's key on loopback), so there is no open mode;
bad or empty JSON is always 400; the header pairs that old clients send and read are both written; removing a service
ends its heartbeats with 404.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from flynn.aio.backoff import Backoff, attempts
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.membership import http_address, raft_address
from flynn.http.client import HttpClient
from flynn.http.server import Api, EventStream, Raw, Request
from flynn.identity import INSIDERS, Identity, PeerKind, access
from flynn.types.codec import Wire, always
from flynn.types.errors import ApiError, Conflict, NotFound, ServiceUnavailable
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, ServiceConfig, ServiceMeta
from flynn.types.status import Health, Status
from flynn.version import VERSION

log = logging.getLogger(__name__)

T = TypeVar("T")

ADMINS = access("operator", "host", "app:discoverd")

FORWARD_SECONDS = 10.0
STALE_SECONDS = 3.0  # a new leader is found in half that time
ASK_LIMIT = timedelta(seconds=15)
HAND_OVER_SECONDS = 10.0
ROUNDS = Backoff(first=timedelta(milliseconds=50), factor=1.5, limit=timedelta(seconds=1))
MAX_BODY_BYTES = 4 * 1024 * 1024  # every member keeps all of it in memory

INSTANCE_EVENTS = frozenset({EventKind.UP, EventKind.UPDATE, EventKind.DOWN})
LEADER_EVENTS = frozenset({EventKind.LEADER})
ALL_EVENTS = frozenset(EventKind)


class LeaderChoice(Wire):
    """An instance, of which only the id counts."""

    id: str = ""


class RaftLeader(Wire):
    host: str


class TargetIndex(Wire):
    last_index: int = always(0)


class ServiceSummary(Wire):
    leader_type: str
    instances: int = always(0)
    leader: str = ""


@dataclass(frozen=True, slots=True)
class DiscoverdApi:
    directory: LiveDirectory
    address: str  # own advertised `ip:port`
    identity: Identity
    shut_down: Callable[[], None]
    about: Callable[[], Mapping[str, str]] = dict  # what else the status says of this process

    def build(self) -> Api:
        api = Api("discoverd", status=self._status, headers=self._headers, max_body_bytes=MAX_BODY_BYTES)
        read = [
            ("GET", "/services", self._services),
            ("GET", "/services/{service}", self._events),
            ("GET", "/services/{service}/meta", self._get_meta),
            ("GET", "/services/{service}/instances", self._instances),
            ("GET", "/services/{service}/leader", self._leader),
            ("GET", "/raft/leader", self._raft_leader),
            ("GET", "/raft/peers", self._raft_peers),
        ]
        write = [
            ("PUT", "/services/{service}", self._create),
            ("DELETE", "/services/{service}", self._remove),
            ("PUT", "/services/{service}/meta", self._put_meta),
            ("PUT", "/services/{service}/instances/{id}", self._put_instance),
            ("DELETE", "/services/{service}/instances/{id}", self._remove_instance),
            ("PUT", "/services/{service}/leader", self._choose_leader),
        ]
        membership = [
            ("DELETE", "/jobs/{job}/instances", self._forget_job),
            ("PUT", "/raft/peers/{peer:.*}", self._add_peer),
            ("DELETE", "/raft/peers/{peer:.*}", self._remove_peer),
        ]
        for method, path, handler in read:
            api.route(method, path, handler, allow=INSIDERS)
        api.route("GET", "/debug/heartbeats", self._at_leader(self._heartbeats), allow=INSIDERS)
        for method, path, handler in write:
            api.route(method, path, self._at_leader(handler), allow=INSIDERS)
        for method, path, handler in membership:
            api.route(method, path, self._at_leader(handler), allow=ADMINS)
        api.route("POST", "/raft/promote", self._promote, allow=ADMINS)
        api.route("POST", "/raft/demote", self._demote, allow=ADMINS)
        api.route("POST", "/shutdown", self._shutdown, allow=ADMINS)
        return api

    # Services.

    async def _services(self, request: Request) -> dict[str, ServiceSummary]:
        return {
            name: ServiceSummary(
                leader_type=service.leader_type,
                instances=len(service.instances),
                leader=service.leader.id if service.leader else "",
            )
            for name, service in sorted(self.directory.state.services.items())
        }

    async def _heartbeats(self, request: Request) -> dict[str, dict[str, float]]:
        """Seconds since each instance was last heard. One the leader has not heard yet is missing."""
        return self.directory.silence()

    async def _create(self, request: Request) -> None:
        config = await request.body(ServiceConfig | None) or ServiceConfig()  # type: ignore[arg-type]  # a union is no class
        await self.directory.create_service(request.path("service"), config.leader_type)

    async def _remove(self, request: Request) -> None:
        await self.directory.remove_service(request.path("service"))

    async def _get_meta(self, request: Request) -> ServiceMeta:
        service = self.directory.service(request.path("service"))
        if service is None or service.meta is None:
            raise NotFound("service meta not found")
        return service.meta

    async def _put_meta(self, request: Request) -> ServiceMeta:
        return await self.directory.put_meta(request.path("service"), await request.body(ServiceMeta))

    async def _instances(self, request: Request) -> list[Instance] | EventStream:
        name = request.path("service")
        if request.accepts_events:
            return self._stream(name, INSTANCE_EVENTS)
        service = self.directory.service(name)
        if service is None or not service.instances:
            raise NotFound("no instances found")
        return service.sorted_instances

    async def _put_instance(self, request: Request) -> None:
        instance = await request.body(Instance, any_content_type=True)
        await self.directory.put_instance(request.path("service"), instance)

    async def _remove_instance(self, request: Request) -> None:
        await self.directory.remove_instance(request.path("service"), request.path("id"))

    async def _forget_job(self, request: Request) -> None:
        await self.directory.forget_job(request.path("job"))

    async def _leader(self, request: Request) -> Instance | EventStream:
        name = request.path("service")
        if request.accepts_events:
            return self._stream(name, LEADER_EVENTS)
        service = self.directory.service(name)
        if service is None or service.leader is None:
            raise NotFound("no leader found")
        return service.leader

    async def _choose_leader(self, request: Request) -> None:
        choice = await request.body(LeaderChoice)
        await self.directory.choose_leader(request.path("service"), choice.id)

    async def _events(self, request: Request) -> EventStream:
        return self._stream(request.path("service"), ALL_EVENTS)

    def _stream(self, name: str, kinds: Collection[EventKind]) -> EventStream:
        return EventStream(_only(kinds, self.directory.watch(name)))

    # The cluster of discoverds.

    async def _raft_leader(self, request: Request) -> RaftLeader:
        leader = self.directory.raft.leader
        if leader is None:
            raise ServiceUnavailable("there is no leader")
        return RaftLeader(host=http_address(leader))

    async def _raft_peers(self, request: Request) -> list[str]:
        return self.members

    async def _add_peer(self, request: Request) -> TargetIndex:
        peer = raft_address(request.path("peer"))
        if peer not in self.directory.raft.members:
            await self.directory.raft.add_member(peer)
        return TargetIndex(last_index=self.directory.raft.index)

    async def _remove_peer(self, request: Request) -> None:
        peer = raft_address(request.path("peer"))
        if peer == raft_address(self.address):
            await self._hand_over()
            raise ServiceUnavailable("another member leads now, ask again")
        if peer in self.directory.raft.members:
            await self.directory.raft.remove_member(peer)

    async def _promote(self, request: Request) -> None:
        """Become a member; returns when this node has all that the others have."""
        others = self.members
        path = f"/raft/peers/{self.address}"

        async def announce() -> int:
            return (await self._ask(others, "PUT", path, TargetIndex)).last_index

        await self.directory.promote(announce)

    async def _demote(self, request: Request) -> None:
        """Cease to be a member, leading or not."""
        others = [member for member in self.members if member != self.address]
        if not self.directory.raft.is_member:
            return
        if not others:
            raise Conflict("the only member cannot be demoted")
        if self.directory.raft.is_leader:
            await self._hand_over()
        await self._ask(others, "DELETE", f"/raft/peers/{self.address}", None)
        await self.directory.demote([raft_address(other) for other in others])

    async def _hand_over(self) -> None:
        """Returns when another member leads. Raises Conflict if there is none, ServiceUnavailable if none would."""
        raft = self.directory.raft
        if len(raft.members) == 1:
            raise Conflict("the only member cannot be removed")
        await raft.hand_over(HAND_OVER_SECONDS)
        async for _ in attempts(ROUNDS, ASK_LIMIT):
            if raft.leader is not None:
                return
        raise ServiceUnavailable("no other member took over the lead")

    async def _ask(self, members: Sequence[str], method: str, path: str, answer: type[T] | None) -> T:
        """Ask until some member, or the leader it names, has done it."""
        last: ApiError = ServiceUnavailable("there is no other member")
        async for _ in attempts(ROUNDS, ASK_LIMIT):
            for member in members:
                async with HttpClient(f"https://{member}", tls=self.identity, timeout=FORWARD_SECONDS) as http:
                    try:
                        return await http.call(method, path, answer=answer)  # type: ignore[return-value]
                    except ApiError as error:
                        if not error.retry:
                            raise
                        last = error
        raise last

    async def _shutdown(self, request: Request) -> TargetIndex:
        """Make way for another process of this node, which waits for that; without one this process goes on."""
        if self.directory.raft.is_leader and len(self.members) > 1:
            try:
                await self._hand_over()
            except ApiError as error:
                log.warning("closing as the leader", extra={"error": error})
        self.shut_down()
        return TargetIndex(last_index=self.directory.raft.index)

    # Around every request.

    @property
    def members(self) -> list[str]:
        return [http_address(member) for member in self.directory.raft.members]

    def _at_leader(self, handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
        async def at_leader(request: Request) -> Any:
            if self.directory.leading:
                return await handler(request)
            leader = self.directory.raft.leader
            if leader is None or http_address(leader) == self.address:
                raise ServiceUnavailable("there is no leader at the moment")
            if request.peer is not None and request.peer.kind is PeerKind.OPERATOR:
                return await self._ask_leader(request, http_address(leader))
            return _redirect(request, http_address(leader))

        return at_leader

    async def _ask_leader(self, request: Request, leader: str) -> Raw:
        body = await request.raw()
        async with HttpClient(f"https://{leader}", tls=self.identity, timeout=FORWARD_SECONDS) as http:
            path = quote(request.raw_path) + (f"?{request.query_string}" if request.query_string else "")
            answer = await http.call(request.method, path, msgspec.Raw(body) if body else None, answer=bytes)
        return Raw(answer or b"", "application/json")

    def _headers(self, request: Request) -> Mapping[str, str]:
        peers, index = ",".join(self.members), str(self.directory.raft.index)
        silence = self.directory.raft.silence
        stale = {"Discoverd-Stale": f"{silence:.0f}"} if silence > STALE_SECONDS else {}
        # Servers of the original write the first pair, its clients read the second.
        return {
            **stale,
            "Discoverd-Peers": peers,
            "Discoverd-Index": index,
            "Discoverd-Current-Peers": peers,
            "Discoverd-Current-Index": index,
        }

    async def _status(self) -> Status:
        raft = self.directory.raft
        leader = raft.leader
        return Status(
            status=Health.HEALTHY if leader and raft.silence < STALE_SECONDS else Health.UNHEALTHY,
            detail={
                "role": "leader" if raft.is_leader else "follower" if raft.is_member else "observer",
                "stale_seconds": round(raft.silence, 1),
                "leader": http_address(leader) if leader else None,
                "members": self.members,
                "index": raft.index,
                **self.about(),
            },
            version=VERSION,
        )


async def _only(kinds: Collection[EventKind], events: AsyncIterator[DiscoverdEvent]) -> AsyncIterator[DiscoverdEvent]:
    async for event in events:
        if event.kind in kinds:
            yield event


def _redirect(request: Request, leader: str) -> Raw:
    """To the same path on the leader; the port is the one the caller used, as with the original."""
    host = leader.rpartition(":")[0]
    port = request.header("Host").rpartition("]")[2].rpartition(":")[2] or leader.rpartition(":")[2]
    query = f"?{request.query_string}" if request.query_string else ""
    return Raw(status=307, headers={"Location": f"https://{host}:{port}{request.raw_path}{query}"})
