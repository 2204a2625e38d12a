"""Replacing the peers of a database cluster: look at it, ask the rule for the next step, do it, look again.

The rule is `deploy.peers`. The controller's own database may be the one whose peers are replaced: there are moments in
which nothing can be read or written, and they are waited out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from flynn.aio.backoff import Backoff, retrying
from flynn.appliances.sirenia.client import ApplianceStatus, DatabaseClient
from flynn.appliances.sirenia.cluster_state import BadClusterState, ClusterState, parse_state
from flynn.controller.deploy.peers import Chain, Done, Member, Start, Stop, Wait, is_restored, next_step
from flynn.discoverd.registry import Registry
from flynn.identity import Identity
from flynn.types.errors import ApiError, ServiceUnavailable
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

T = TypeVar("T")

STATUS_SECONDS = 3.0
LOOK_EVERY = timedelta(milliseconds=200)
BUSY_LIMIT = timedelta(hours=6)  # a peer that says that it copies its upstream is given so long
DATABASE_PATIENCE = timedelta(minutes=1)
DATABASE_RETRY = Backoff(first=timedelta(milliseconds=200), factor=1.5, limit=timedelta(seconds=1))


class NoProgress(Exception):
    """The cluster has not become what it should; `str()` says what is missing."""


NOBODY = Chain(())


@dataclass(frozen=True, slots=True)
class Seen:
    """A database cluster as it is now."""

    state: ClusterState | None
    instances: tuple[Instance, ...] = ()
    chain: Chain = NOBODY
    working: str = ""  # changes as long as somebody gets on with what he lacks
    busy: bool = False  # somebody says that he is at something that takes long

    def instance(self, member: Member) -> Instance | None:
        return next((instance for instance in self.instances if instance.id == member.id), None)

    def jobs(self, release: str) -> set[str]:
        """The jobs of a release that are listed."""
        return {
            instance.meta.get("FLYNN_JOB_ID", "") for instance in self.instances if _release_of(instance) == release
        }


class DatabaseClusters:
    """Database clusters as the directory and their peers tell of them."""

    def __init__(self, registry: Registry, identity: Identity | None) -> None:
        self._registry = registry
        self._identity = identity

    async def look(self, service: str) -> Seen:
        """Raises ApiError when the directory does not answer, `BadClusterState` for metadata that is no state."""
        meta = await self._registry.get_meta(service)
        state = parse_state(meta.data) if meta is not None and meta.data is not None else None
        instances = tuple(await self._registry.instances(service))
        if state is None:
            return Seen(None, instances)
        answers = await asyncio.gather(*(self._status(instance) for instance in instances))
        return seen(state, instances, dict(zip((instance.id for instance in instances), answers, strict=True)))

    async def _status(self, instance: Instance) -> ApplianceStatus | None:
        client = self._client(instance, STATUS_SECONDS)
        try:
            return await client.status()
        except ApiError:
            return None
        finally:
            await client.close()

    async def stop(self, instance: Instance, limit: timedelta) -> None:
        """Have a peer stop its database and leave the directory. Raises ApiError."""
        client = self._client(instance, limit.total_seconds())
        try:
            await client.stop()
        finally:
            await client.close()

    def _client(self, instance: Instance, timeout: float) -> DatabaseClient:
        if self._identity is None:
            raise ServiceUnavailable("databases cannot be asked without a certificate", retry=False)
        return DatabaseClient(instance, self._identity, timeout=timeout)


def seen(
    state: ClusterState, instances: Sequence[Instance], statuses: Mapping[str, ApplianceStatus | None]
) -> Seen:  # fmt: skip
    """Put together what the state says, who is listed, and what each peer says of itself."""
    listed = {instance.id for instance in instances}
    chain = [instance for instance in (state.primary, state.sync, *(state.asyncs or ())) if instance is not None]
    members = []
    for place, instance in enumerate(chain):
        own = statuses.get(instance.id)
        above = statuses.get(chain[place - 1].id) if place else None
        lacks = _standby_lacks(own, above, instance, state.generation) if place else _primary_lacks(own)
        members.append(Member(instance.id, _release_of(instance), instance.id in listed, lacks))
    in_chain = {instance.id for instance in chain}
    outside = tuple(
        Member(instance.id, _release_of(instance), True, status.peer.reason if status else "it does not answer")
        for instance in instances
        if instance.id not in in_chain
        for status in [statuses.get(instance.id)]
    )
    behind = {member.id for member in members if member.lacks} | {member.id for member in outside}
    told = [(key, status) for key, status in sorted(statuses.items()) if key in behind and status is not None]
    working = "; ".join(
        f"{key} {status.peer.role} {status.database.running} {status.database.xlog}" for key, status in told
    )
    return Seen(
        state,
        tuple(instances),
        Chain(tuple(members), outside, state.freeze.reason if state.freeze is not None else ""),
        f"{state.generation} {[member.id for member in members]} {working}",
        any(status.database.detail for _, status in told),
    )


def _primary_lacks(own: ApplianceStatus | None) -> str:
    if own is None:
        return "it does not answer"
    return "" if own.database.read_write else f"it does not take writes ({own.peer.reason})"


def _standby_lacks(
    own: ApplianceStatus | None, above: ApplianceStatus | None, instance: Instance, generation: int
) -> str:  # fmt: skip
    if own is None:
        return "it does not answer"
    database = own.database
    if not database.running or database.detail:
        return database.detail or f"its database does not run ({own.peer.reason})"
    if above is None:
        return "the one before it does not answer"
    if above.peer.id not in database.connected:
        return f"it receives nothing from the one before it ({own.peer.reason})"
    synced = above.database.synced_downstream
    if synced is None or synced.id != instance.id:
        return "it has not caught up"
    if database.lineage is None or database.lineage.generation != generation:
        return "it has not caught up with this generation"
    return ""


def _release_of(instance: Instance) -> str:
    return instance.meta.get("FLYNN_RELEASE_ID", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReplacement:
    """The replacement of all peers of one service by those of `release`.

    `expected` tells how many peers of the release were asked for, `start` asks for one more and returns when it is
    listed, `told` tells of a step of a release: starting, up, stopping, down.
    """

    clusters: DatabaseClusters
    service: str
    release: str
    wanted: int
    limit: timedelta  # for a step, and for waiting without progress
    expected: Callable[[Seen], Awaitable[int]]
    start: Callable[[Seen], Awaitable[None]]
    told: Callable[[str, str], Awaitable[None]]

    async def run(self, *, back: bool = False) -> None:
        """Go on until nothing is left; `back` to a release whose peers may have been stopped already.

        Raises:
            NoProgress: something is missing, and nothing gets on.
            What `start` raises.
        """
        loop = asyncio.get_running_loop()
        began = since = loop.time()
        before = None
        while True:
            now = await self._look()
            expected = await self.expected(now)
            if back and is_restored(now.chain, self.release, self.wanted, expected):
                return
            step = next_step(now.chain, self.release, self.wanted, expected)
            if (step, now.working) != before:
                before, since = (step, now.working), loop.time()
                log.info("database cluster", extra={"service": self.service, "step": step, "expected": expected})
            match step:
                case Done():
                    return
                case Start():
                    await self.start(now)
                case Stop(member):
                    await self._stop(now, member)
                case Wait(reason):
                    if now.busy and loop.time() - began < BUSY_LIMIT.total_seconds():
                        since = loop.time()
                    if loop.time() - since > self.limit.total_seconds():
                        raise NoProgress(f"{reason} (waited {self.limit.total_seconds():g} seconds)")
                    await asyncio.sleep(LOOK_EVERY.total_seconds())

    async def _look(self) -> Seen:
        """The cluster; a directory that does not answer is waited for."""
        try:
            return await retrying(
                lambda: self.clusters.look(self.service), on=ApiError, policy=DATABASE_RETRY, within=self.limit
            )  # fmt: skip
        except (ApiError, BadClusterState) as error:
            raise NoProgress(f"the cluster cannot be looked at: {error}") from error

    async def _stop(self, now: Seen, member: Member) -> None:
        """Stop a peer and return when the directory has forgotten it."""
        instance = now.instance(member)
        assert instance is not None  # the rule stops those who are there
        await self.told(member.release, "stopping")
        try:
            await self.clusters.stop(instance, self.limit)
        except ApiError as error:
            log.warning("a peer does not stop", extra={"peer": instance.addr, "error": error})
        await self.until(lambda seen: seen.instance(member) is None, "timed out waiting for peer to stop")
        await self.told(member.release, "down")

    async def until(self, condition: Callable[[Seen], bool], otherwise: str) -> None:
        """Return when a condition holds. Raises NoProgress with `otherwise`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limit.total_seconds()
        while not condition(await self._look()):
            if loop.time() > deadline:
                raise NoProgress(otherwise)
            await asyncio.sleep(LOOK_EVERY.total_seconds())


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Do something with the controller's database, which may have no primary for a moment."""
    return await retrying(call, on=ServiceUnavailable, policy=DATABASE_RETRY, within=DATABASE_PATIENCE)
