"""One peer among others who write at the same moment, or who decide about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import supervisor
from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze, Lineage, Role, parse_state
from flynn.appliances.sirenia.database import DatabaseConfig, DatabaseInfo, Held
from flynn.appliances.sirenia.evaluate import Me
from flynn.appliances.sirenia.neighbours import Heard
from flynn.appliances.sirenia.peer import Peer
from flynn.appliances.sirenia.suspicion import Answer
from flynn.discoverd.memory import MemoryRegistry
from flynn.types.codec import builtins, replace
from flynn.types.errors import PreconditionFailed, Unreachable
from flynn.types.instance import Instance, LeaderType, ServiceMeta
from tests.appliances.sirenia.simulation import ID, LoopClock, run_virtually
from tests.appliances.sirenia.test_scenarios import NOW, compare, node

STATE = ClusterState(generation=5, init_wal="0/A", primary=node("n1"), sync=node("n2"), asyncs=[node("n3")])
RETRY = Backoff(first=timedelta(seconds=1), factor=1, jitter=0)


@dataclass
class RecordingDatabase:
    """Starts when it is told what to be, and remembers what that was."""

    zero_position: str = "0/0"
    roles: list[Role] = field(default_factory=list)
    holds: int = 0
    applying: bool = False  # it was told to be something, for the first time
    start_seconds: float = 0.5
    hold_seconds: float = 0.0
    lineage: Lineage | None = field(default_factory=lambda: Lineage(generation=5, primary="n1", upstream="n1"))

    compare = staticmethod(compare)

    @property
    def running(self) -> bool:
        return self.roles[-1:] not in ([], [Role.NONE])

    async def apply(self, config: DatabaseConfig) -> None:
        self.applying = True
        if self.roles[-1:] != [config.role]:
            await asyncio.sleep(self.start_seconds)
            self.roles.append(config.role)

    async def hold(self) -> Held:
        assert self.running, "a server that is off cannot be held"
        self.holds += 1
        await asyncio.sleep(self.hold_seconds)
        return Held(received="0/A", usable="0/A")

    async def enable_writes(self, generation: int) -> None: ...

    async def record_lineage(self, lineage: Lineage) -> None: ...

    async def info(self) -> DatabaseInfo:
        return DatabaseInfo(running=self.running, xlog="0/A", lineage=self.lineage)

    def reconsider(self) -> None: ...

    def interrupt(self) -> None: ...

    async def stop(self) -> None: ...


class Answering:
    async def ask(self, instance: Instance) -> Heard:
        return Heard(Answer.WELL, id=instance.meta[ID])


@dataclass
class DownUntil:
    """Daemons whose databases run from a moment on."""

    moment: float

    async def ask(self, instance: Instance) -> Heard:
        now = asyncio.get_running_loop().time()
        return Heard(Answer.DOWN if now < self.moment else Answer.WELL, id=instance.meta[ID])


class Contested(MemoryRegistry):
    """Somebody else's state arrives just before ours, once."""

    rival: Callable[[ClusterState], ClusterState] | None = None
    reachable: bool = True

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        if not self.reachable:
            raise Unreachable("cut off")
        if self.rival is not None:
            rival, self.rival = self.rival, None
            await self.write(rival)
        return await super().put_meta(service, meta)

    async def write(self, edit: Callable[[ClusterState], ClusterState]) -> None:
        state = edit(await self.stored())
        meta = await self.get_meta("db")
        assert meta is not None and state.primary is not None
        await MemoryRegistry.put_meta(
            self, "db", ServiceMeta(data=builtins(state), index=meta.index, leader_id=state.primary.id)
        )  # fmt: skip

    async def stored(self) -> ClusterState:
        meta = await self.get_meta("db")
        assert meta is not None
        return parse_state(meta.data)


@asynccontextmanager
async def playing(
    own: str, *others: str, state: ClusterState = STATE
) -> AsyncIterator[tuple[Peer, RecordingDatabase, Contested]]:
    registry, database = Contested(), RecordingDatabase()
    await registry.create("db", LeaderType.MANUAL)
    assert state.primary is not None
    await registry.put_meta("db", ServiceMeta(data=builtins(state), leader_id=state.primary.id))
    for name in (own, *others):
        await registry.register("db", node(name))
    peer = Peer(registry, "db", Me(node(own), ID, False), database, LoopClock(), Answering(), RETRY)
    async with supervisor() as spawn:
        spawn("follow", peer.follow())
        spawn("act", peer.act())
        yield peer, database, registry


def named(state: ClusterState) -> tuple[int, list[str]]:
    members = (state.primary, state.sync, *(state.asyncs or []))
    return state.generation, [member.meta[ID] for member in members if member is not None]


def test_a_peer_that_comes_up_starts_its_database_before_it_takes_over() -> None:
    async def story(own: str, *present: str) -> tuple[int, list[str]]:
        async with playing(own, *present) as (peer, database, registry):
            await asyncio.sleep(10)
            assert database.holds == 1
            assert database.roles[0] is (Role.SYNC if own == "n2" else Role.PRIMARY)
            assert database.roles[-1] is Role.PRIMARY
            assert peer.role is Role.PRIMARY
            return named(await registry.stored())

    assert run_virtually(story("n1", "n3")) == (6, ["n1", "n3"]), "a primary without its sync"
    assert run_virtually(story("n2", "n3")) == (6, ["n2", "n3"]), "a sync without its primary"


def test_losing_the_race_of_a_takeover_means_to_follow_the_winner() -> None:
    """The primary that was taken for dead has replaced its sync in the same moment."""

    async def story() -> None:
        async with playing("n2", "n1", "n3") as (peer, database, registry):
            await asyncio.sleep(2)
            assert database.roles == [Role.SYNC]
            registry.rival = lambda state: replace(state, generation=6, sync=node("n3"), asyncs=[])
            await registry.deregister("db", node("n1").id)
            await asyncio.sleep(10)
            assert named(await registry.stored()) == (6, ["n1", "n3"])
            assert peer.role is Role.UNASSIGNED
            assert database.roles == [Role.SYNC, Role.NONE]

    run_virtually(story())


def test_losing_the_race_for_a_new_async_means_to_read_and_decide_again() -> None:
    """An operator froze the cluster in the same moment: what was to be written is not wanted any more."""

    async def story() -> None:
        async with playing("n1", "n2", "n3") as (_, database, registry):
            await asyncio.sleep(2)
            registry.rival = lambda state: replace(state, freeze=Freeze(frozen_at=NOW, reason="moving"))
            await registry.register("db", node("n4"))
            await asyncio.sleep(10)
            state = await registry.stored()
            assert named(state) == (5, ["n1", "n2", "n3"])
            assert state.freeze is not None
            await registry.write(lambda state: replace(state, freeze=None))
            await asyncio.sleep(10)
            assert named(await registry.stored()) == (5, ["n1", "n2", "n3", "n4"])
            assert database.roles == [Role.PRIMARY]

    run_virtually(story())


def test_who_was_deposed_stays_quiet_whatever_happens_to_the_others() -> None:
    async def story() -> None:
        async with playing("n1", "n2", "n3") as (peer, database, registry):
            await asyncio.sleep(2)
            await registry.write(
                lambda state: replace(
                    state, generation=6, primary=node("n2"), sync=node("n3"), asyncs=[], deposed=[node("n1")]
                )
            )
            for event in (
                registry.register("db", node("n4")),
                registry.deregister("db", node("n3").id),
                registry.deregister("db", node("n2").id),
                registry.write(lambda state: replace(state, generation=7, primary=node("n3"), sync=node("n4"))),
            ):
                await event
                await asyncio.sleep(3)
                assert peer.role is Role.DEPOSED
            assert database.roles == [Role.PRIMARY, Role.NONE]
            assert named(await registry.stored()) == (7, ["n3", "n4"])
            await registry.write(lambda state: replace(state, asyncs=[node("n1")], deposed=[]))
            await asyncio.sleep(3)
            assert database.roles == [Role.PRIMARY, Role.NONE, Role.ASYNC], "taken in again"

    run_virtually(story())


def test_a_primary_that_starts_slowly_does_not_blame_its_sync_for_having_nothing_to_copy() -> None:
    async def story(well_from: float) -> int:
        async with playing("n1", "n2", "n3") as (peer, database, registry), supervisor() as spawn:
            database.start_seconds = 20
            peer.neighbours = DownUntil(asyncio.get_running_loop().time() + well_from)
            spawn("look", peer.look())
            await asyncio.sleep(30)
            return (await registry.stored()).generation

    assert run_virtually(story(21)) == 5, "a second after it could be copied the sync runs"
    assert run_virtually(story(29)) > 5, "but once there is something to copy, it is expected to"


def test_what_was_declared_while_the_database_was_being_held_is_not_replaced() -> None:
    """The other half of the pair was as quick, and its new pair may have acknowledged something by then."""

    async def story() -> None:
        async with playing("n2", "n1", "n3") as (peer, database, registry):
            await asyncio.sleep(2)
            database.hold_seconds = 3
            await registry.deregister("db", node("n1").id)
            await asyncio.sleep(1)
            assert database.holds == 1
            await registry.write(lambda state: replace(state, generation=6, sync=node("n3"), asyncs=[]))
            await asyncio.sleep(10)
            assert named(await registry.stored()) == (6, ["n1", "n3"])
            assert peer.role is Role.UNASSIGNED
            assert database.roles == [Role.SYNC, Role.NONE], "nor was the database moved by the old decision"

    run_virtually(story())


def test_data_that_lost_their_way_while_they_were_to_be_held_do_not_take_over() -> None:
    async def story() -> None:
        async with playing("n2", "n1", "n3") as (peer, database, registry):
            await asyncio.sleep(2)
            database.hold_seconds = 3
            await registry.deregister("db", node("n1").id)
            await asyncio.sleep(1)
            database.lineage = None
            await asyncio.sleep(10)
            assert named(await registry.stored()) == (5, ["n1", "n2", "n3"])
            assert "do not belong" in peer.reason

    run_virtually(story())


@pytest.mark.parametrize("own", ["n1", "n2"])
def test_a_takeover_that_was_under_way_when_its_peer_was_killed_comes_too_late(own: str) -> None:
    """From the moment at which the database may acknowledge again, it must not count any more."""

    async def story() -> None:
        async with playing(own, *{"n1", "n2", "n3"} - {own}) as (_, database, registry):
            known = await registry.get_meta("db")
            assert known is not None
            late = builtins(replace(STATE, generation=6, primary=node(own), sync=node("n3"), asyncs=[]))
            while not database.applying:
                await asyncio.sleep(0.01)
            with pytest.raises(PreconditionFailed):
                await registry.put_meta("db", ServiceMeta(data=late, index=known.index, leader_id=node(own).id))
            await asyncio.sleep(10)
            assert named(await registry.stored()) == (5, ["n1", "n2", "n3"])
            assert database.roles == [Role.PRIMARY if own == "n1" else Role.SYNC]

    run_virtually(story())


def test_a_database_stays_off_until_a_takeover_of_its_former_life_cannot_count_any_more() -> None:
    async def story() -> None:
        async with playing("n2", "n1", "n3") as (_, database, registry):
            registry.reachable = False
            await asyncio.sleep(10)
            assert not database.applying
            registry.reachable = True
            await asyncio.sleep(5)
            assert database.roles == [Role.SYNC]

    run_virtually(story())


def test_in_a_frozen_cluster_nobody_can_have_tried_to_take_over() -> None:
    async def story() -> None:
        frozen = replace(STATE, freeze=Freeze(frozen_at=NOW, reason="moving"))
        async with playing("n2", "n1", "n3", state=frozen) as (_, database, registry):
            registry.reachable = False
            await asyncio.sleep(5)
            assert database.roles == [Role.SYNC]

    run_virtually(story())
