"""One peer against the directory (in memory) and a database that only remembers what it was told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import supervisor
from flynn.appliances.sirenia.cluster_state import ClusterState, Lineage, Role, parse_state
from flynn.appliances.sirenia.database import DatabaseConfig, DatabaseError, DatabaseInfo, Held
from flynn.appliances.sirenia.evaluate import Me
from flynn.appliances.sirenia.peer import Peer
from flynn.discoverd.memory import MemoryRegistry
from flynn.types.codec import builtins, replace
from flynn.types.instance import Instance, LeaderType, ServiceMeta

SERVICE = "postgres"
AT_ONCE = Backoff(first=timedelta(milliseconds=1), factor=1)
N1 = Instance.at("10.0.0.1:5432", "tcp", {"ID": "p1"})
N2 = Instance.at("10.0.0.2:5432", "tcp", {"ID": "p2"})


class ImpatientClock:
    """Waiting takes one turn of the loop."""

    def now(self) -> datetime:
        return datetime(2026, 1, 2, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, duration: timedelta) -> None:
        await asyncio.sleep(0)


@dataclass
class RememberingDatabase:
    zero_position: str = "0/00000000"
    failures: int = 0  # so many times it refuses
    applied: list[Role] = field(default_factory=list)
    stopped: bool = False

    async def apply(self, config: DatabaseConfig) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise DatabaseError("not today")
        if self.applied[-1:] != [config.role]:
            self.applied.append(config.role)

    async def info(self) -> DatabaseInfo:
        return DatabaseInfo(running=bool(self.applied) and not self.stopped)

    def compare(self, a: str, b: str) -> int:
        return (a > b) - (a < b)

    async def hold(self) -> Held:
        return Held(received="0/00000001", usable="0/00000001")

    async def record_lineage(self, lineage: Lineage) -> None:
        return None

    async def enable_writes(self, generation: int) -> None:
        return None

    def reconsider(self) -> None:
        return None

    def interrupt(self) -> None:
        return None

    async def stop(self) -> None:
        self.stopped = True


@asynccontextmanager
async def peer_running(
    registry: MemoryRegistry, database: RememberingDatabase, own: Instance = N1
) -> AsyncIterator[Peer]:
    peer = Peer(registry, SERVICE, Me(own, "ID", singleton=True), database, ImpatientClock(), retry=AT_ONCE)
    async with registry.registered(SERVICE, own, leader_type=LeaderType.MANUAL), supervisor() as spawn:
        spawn("follow", peer.follow())
        spawn("act", peer.act())
        yield peer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


async def stored(registry: MemoryRegistry) -> ClusterState:
    meta = await registry.get_meta(SERVICE)
    assert meta is not None
    return parse_state(meta.data)


async def test_the_first_peer_founds_the_cluster_and_leads_it() -> None:
    registry, database = MemoryRegistry(), RememberingDatabase()
    async with peer_running(registry, database) as peer:
        await until(lambda: database.applied == [Role.PRIMARY])
        state = await stored(registry)
        assert (state.generation, state.singleton, state.primary) == (1, True, N1)
        assert state.freeze is not None
        leader = await registry.leader(SERVICE)
        assert leader is not None
        assert leader.id == N1.id
        await until(lambda: peer.info().peers is not None)
        assert peer.info().role is Role.PRIMARY


async def test_a_restart_at_another_address_keeps_the_generation_and_takes_the_lead_back() -> None:
    registry, database = MemoryRegistry(), RememberingDatabase()
    async with peer_running(registry, database):
        await until(lambda: database.applied == [Role.PRIMARY])
    assert await registry.leader(SERVICE) is None
    moved = Instance.at("10.0.0.9:5432", "tcp", {"ID": "p1"})
    again = RememberingDatabase()
    async with peer_running(registry, again, moved):
        await until(lambda: again.applied == [Role.PRIMARY])
        state = await stored(registry)
        assert (state.generation, state.primary) == (1, moved)
        leader = await registry.leader(SERVICE)
        assert leader is not None
        assert leader.addr == "10.0.0.9:5432"


async def test_a_second_peer_stays_without_a_database() -> None:
    registry, first, second = MemoryRegistry(), RememberingDatabase(), RememberingDatabase()
    async with peer_running(registry, first):
        await until(lambda: first.applied == [Role.PRIMARY])
        async with peer_running(registry, second, N2):
            await until(lambda: second.applied == [Role.NONE])
    assert first.applied == [Role.PRIMARY]


async def test_a_database_that_fails_is_tried_again_and_the_status_says_so_meanwhile() -> None:
    registry, database = MemoryRegistry(), RememberingDatabase(failures=3)
    async with peer_running(registry, database) as peer:
        await until(lambda: peer.info().retry_pending is not None)
        await until(lambda: database.applied == [Role.PRIMARY])
        await until(lambda: peer.info().retry_pending is None)


async def test_unreadable_metadata_leaves_the_last_good_state_in_force() -> None:
    registry, database = MemoryRegistry(), RememberingDatabase()
    async with peer_running(registry, database) as peer:
        await until(lambda: database.applied == [Role.PRIMARY])
        meta = await registry.get_meta(SERVICE)
        assert meta is not None
        await registry.put_meta(SERVICE, ServiceMeta(data={"nonsense": True}, index=meta.index))
        for _ in range(20):
            await asyncio.sleep(0)
        assert peer.info().role is Role.PRIMARY
        assert peer.info().state is not None
    assert database.applied == [Role.PRIMARY]


class ContestedRegistry(MemoryRegistry):
    """Somebody else's first state always arrives just before ours."""

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        if meta.index == 0:
            rival = ClusterState(generation=1, singleton=True, primary=N2)
            await super().put_meta(service, ServiceMeta(data=builtins(rival), leader_id=N2.id))
        return await super().put_meta(service, meta)


async def test_losing_the_race_for_the_first_state_means_to_follow_the_winner() -> None:
    database = RememberingDatabase()
    async with peer_running(ContestedRegistry(), database) as peer:
        await until(lambda: peer.info().role is Role.UNASSIGNED)
    assert database.applied == [Role.NONE]


async def test_a_stopped_peer_does_not_react_any_more() -> None:
    registry, database = MemoryRegistry(), RememberingDatabase()
    async with peer_running(registry, database) as peer:
        await until(lambda: database.applied == [Role.PRIMARY])
        await peer.stop()
        state = replace(await stored(registry), generation=2, primary=N2)
        meta = await registry.get_meta(SERVICE)
        assert meta is not None
        await registry.put_meta(SERVICE, ServiceMeta(data=builtins(state), index=meta.index))
        for _ in range(20):
            await asyncio.sleep(0)
        assert database.stopped
        assert database.applied == [Role.PRIMARY]


def test_every_key_of_the_database_s_status_is_always_there() -> None:
    assert set(builtins(DatabaseInfo())) == {
        "config",
        "running",
        "synced_downstream",
        "xlog",
        "user_exists",
        "read_write",
    }
