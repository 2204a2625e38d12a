"""What a takeover needs, and what a peer does while nobody knows whether one counts."""

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import supervisor
from flynn.appliances.sirenia.cluster_state import ClusterState, Lineage, Role, parse_state
from flynn.appliances.sirenia.database import DatabaseConfig, DatabaseInfo, Held
from flynn.appliances.sirenia.evaluate import Cluster, Me, evaluate
from flynn.appliances.sirenia.neighbours import Heard
from flynn.appliances.sirenia.peer import Peer
from flynn.appliances.sirenia.suspicion import Answer, doubted, still_awaited
from flynn.appliances.sirenia.takeover import follows
from flynn.discoverd.memory import MemoryRegistry
from flynn.types.codec import builtins
from flynn.types.errors import Unreachable
from flynn.types.instance import Instance, LeaderType, ServiceMeta
from tests.appliances.sirenia.simulation import ID, LoopClock, run_virtually
from tests.appliances.sirenia.test_scenarios import NOW, compare, node

STATE = ClusterState(generation=5, init_wal="0/A", primary=node("n1"), sync=node("n2"), asyncs=[node("n3")])


@pytest.mark.parametrize(
    ("lineage", "expected"),
    [
        pytest.param(None, False, id="data of unknown origin never"),
        pytest.param(Lineage(generation=5, primary="n1", upstream="n1"), True, id="those of the generation"),
        pytest.param(Lineage(generation=4, primary="n1", upstream="n9"), True, id="the one before, same primary"),
        pytest.param(Lineage(generation=4, primary="n9", upstream="n1"), False, id="not before a promotion"),
        pytest.param(Lineage(generation=3, primary="n1", upstream="n1"), False, id="nothing older"),
    ],
)
def test_lineage(lineage: Lineage | None, expected: bool) -> None:
    assert follows(lineage, STATE, "n1") is expected


def test_a_neighbour_is_gone_when_it_has_not_been_well_for_as_long_as_its_answer_asks_for() -> None:
    doubt = doubted(None, "n1", Answer.SILENT, 100.0)
    assert doubt is not None
    assert not doubt.is_gone(102.9)
    assert doubt.is_gone(103.0)
    refused = doubted(doubt, "n1", Answer.REFUSED, 101.0)
    assert refused is not None
    assert refused.is_gone(101.0)
    assert doubted(refused, "n1", Answer.WELL, 101.0) is None
    other = doubted(refused, "n2", Answer.REFUSED, 101.0)
    assert other is not None
    assert not other.is_gone(101.0)


def test_members_that_were_never_seen_are_awaited_for_a_while() -> None:
    assert still_awaited(["n1", "n2"], {"n1"}, 100.0, 110.0) == {"n2"}
    assert still_awaited(["n1", "n2"], {"n1"}, 100.0, 120.0) == frozenset()


NAMES = ["n1", "n2", "n3", "n4", "n5"]


@st.composite
def pictures(draw: st.DrawFn) -> Cluster:
    order = draw(st.permutations(NAMES))
    asyncs, deposed = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    state = ClusterState(
        generation=draw(st.integers(1, 9)),
        init_wal="0/A",
        primary=node(order[0]),
        sync=node(order[1]),
        asyncs=[node(name) for name in order[2 : 2 + asyncs]],
        deposed=[node(name) for name in order[4 : 4 + deposed]],
    )
    peers = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return Cluster(
        peers=tuple(node(name, index) for index, name in enumerate(peers, 1)),
        state=state,
        gone=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
        awaited=frozenset(set(NAMES) - set(peers)) if draw(st.booleans()) else frozenset(),
        established=draw(st.booleans()),
    )


@given(pictures())
def test_of_any_picture_the_roles_are_one_chain_and_only_the_pair_declares(cluster: Cluster) -> None:
    decisions = {name: evaluate(Me(node(name), ID, False), cluster, "0/0", NOW) for name in NAMES}
    state = cluster.state
    assert state is not None
    assert [name for name, one in decisions.items() if one.role is Role.PRIMARY] == [state.primary.meta[ID]]  # type: ignore[union-attr]
    assert [name for name, one in decisions.items() if one.role is Role.SYNC] == [state.sync.meta[ID]]  # type: ignore[union-attr]
    for name, one in decisions.items():
        if one.downstream is not None:
            below = decisions[one.downstream.meta[ID]]
            assert below.upstream is not None
            assert below.upstream.meta[ID] == name
        if one.takeover is not None:
            new = one.takeover.state
            assert one.role in (Role.PRIMARY, Role.SYNC)
            assert new.generation == state.generation + 1
            members = [peer.meta[ID] for peer in (new.primary, new.sync, *(new.asyncs or [])) if peer is not None]
            assert members[0] == name
            assert len(set(members)) == len(members)
            registered = {peer.meta[ID] for peer in cluster.peers}
            assert set(members[1:]) <= registered - cluster.gone
            assert not set(members) & {peer.meta[ID] for peer in new.deposed}
        if one.write is not None:
            assert one.role is Role.PRIMARY
            assert one.write.generation == state.generation
            assert (one.write.sync and one.write.sync.meta) == (state.sync and state.sync.meta)


class HeldDatabase:
    """Says when it may acknowledge, which is all that matters here."""

    zero_position = "0/0"

    def __init__(self) -> None:
        self.acknowledges = False
        self.releases = 0

    compare = staticmethod(compare)

    async def apply(self, config: DatabaseConfig) -> None:
        self.releases += not self.acknowledges
        self.acknowledges = True

    async def hold(self) -> Held:
        self.acknowledges = False
        return Held(received="0/A", usable="0/A")

    async def enable_writes(self, generation: int) -> None: ...

    async def record_lineage(self, lineage: Lineage) -> None: ...

    async def info(self) -> DatabaseInfo:
        return DatabaseInfo(running=True, xlog="0/A", lineage=Lineage(generation=5, primary="n1", upstream="n1"))

    def reconsider(self) -> None: ...

    def interrupt(self) -> None: ...

    async def stop(self) -> None: ...


class Answering:
    async def ask(self, instance: Instance) -> Heard:
        return Heard(Answer.WELL, id=instance.meta[ID])


class DeafRegistry(MemoryRegistry):
    """Takes writes and tells the writer nothing, as long as it is deaf."""

    deaf = False
    puts = 0

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        self.puts += 1
        if self.deaf:
            raise Unreachable("no answer in time")
        return await super().put_meta(service, meta)


def test_a_database_stays_held_until_a_takeover_without_an_answer_has_come_to_its_end() -> None:
    async def story() -> None:
        registry, database = DeafRegistry(), HeldDatabase()
        await registry.create("db", LeaderType.MANUAL)
        await MemoryRegistry.put_meta(registry, "db", ServiceMeta(data=builtins(STATE), leader_id=STATE.primary.id))  # type: ignore[union-attr]
        for name in ("n1", "n2", "n3"):
            await registry.register("db", node(name))
        me = Me(node("n2"), ID, False)
        retry = Backoff(first=timedelta(seconds=1), factor=1, jitter=0)
        peer = Peer(registry, "db", me, database, LoopClock(), Answering(), retry)
        async with supervisor() as spawn:
            spawn("follow", peer.follow())
            spawn("act", peer.act())
            await asyncio.sleep(1)
            assert (peer.role, database.acknowledges) == (Role.SYNC, True)
            registry.deaf, registry.puts = True, 0
            await registry.deregister("db", node("n1").id)
            await asyncio.sleep(3)
            assert registry.puts >= 2
            assert not database.acknowledges
            # The primary is back, so nobody wants the takeover any more; but it might still count.
            await registry.register("db", node("n1"))
            await asyncio.sleep(5)
            assert (peer.role, database.acknowledges) == (Role.SYNC, False)
            registry.deaf = False
            await asyncio.sleep(3)
            assert (peer.role, database.acknowledges) == (Role.SYNC, True)
            meta = await registry.get_meta("db")
            assert meta is not None
            assert parse_state(meta.data).generation == 5

    run_virtually(story())
