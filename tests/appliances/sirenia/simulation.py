"""Several real peers on virtual time, over a simulated directory, network and databases. Everything follows a seed.

What is real: `Peer` and all its rules. What is played: a directory with compare-and-set whose answers get lost or come
late, links that are cut, daemons and databases that crash, standbys that lag. Clients write to whoever lets them,
former primaries included, and remember what was acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from flynn.aio.backoff import Backoff
from flynn.aio.broadcast import Broadcast
from flynn.appliances.sirenia.cluster_state import ClusterState, Lineage, Role, parse_state
from flynn.appliances.sirenia.database import DatabaseConfig, DatabaseError, DatabaseInfo, Held
from flynn.appliances.sirenia.evaluate import Me
from flynn.appliances.sirenia.neighbours import Heard
from flynn.appliances.sirenia.peer import Peer
from flynn.appliances.sirenia.suspicion import Answer
from flynn.discoverd.memory import MemoryRegistry
from flynn.types.errors import ApiError, Unreachable
from flynn.types.instance import DiscoverdEvent, Instance, LeaderType, ServiceMeta

T = TypeVar("T")

SERVICE = "db"
TTL = 10.0
ID = "ID"


class JumpingSelector(selectors.SelectSelector):
    """Waiting costs nothing: the clock jumps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits for somebody else")
        self.now += max(timeout, 0.0)
        return []  # nobody comes in from outside


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(body: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body)


class LoopClock:
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, duration: timedelta) -> None:
        await asyncio.sleep(duration.total_seconds())


class SafetyViolated(AssertionError):
    pass


class Unordered(Broadcast[DiscoverdEvent]):
    """Who watches is served in an order that is another one each time."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def send(self, item: DiscoverdEvent) -> None:
        order = list(self._subscriptions)
        self._rng.shuffle(order)
        self._subscriptions = dict.fromkeys(order)
        super().send(item)


Entry = tuple[int, str, int]
"""Timeline, who wrote it, and a number: two entries are the same write or they differ."""


@dataclass
class Disk:
    """What survives a crash."""

    log: list[Entry] = field(default_factory=list)
    timeline: int = 1
    standby: bool = False
    exists: bool = False
    lineage: Lineage | None = None


@dataclass
class World:
    rng: random.Random
    directory: MemoryRegistry = field(default_factory=MemoryRegistry)
    nodes: dict[str, Node] = field(default_factory=dict)
    cut: set[frozenset[str]] = field(default_factory=set)  # pairs of names; "directory" is one as well
    paranoia: float = 0.0  # share of questions after which a neighbour is taken for dead that is not
    slow: float = 0.02  # seconds that the directory may take
    flaky: float = 0.0  # share of directory writes whose answer is lost
    acknowledged: set[Entry] = field(default_factory=set)
    ackers: dict[int, str] = field(default_factory=dict)  # generation -> the one who acknowledged in it
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory._changes.default_factory = lambda: Unordered(self.rng)

    def linked(self, a: str, b: str) -> bool:
        return a == b or frozenset({a, b}) not in self.cut

    async def delay(self, most: float = 0.02) -> None:
        await asyncio.sleep(self.rng.uniform(0.0005, most))

    def tell(self, text: str) -> None:
        self.story.append(f"{asyncio.get_running_loop().time():8.3f} {text}")

    def acknowledge(self, node: str, generation: int, entry: Entry) -> None:
        if self.ackers.setdefault(generation, node) != node:
            raise SafetyViolated(f"{node} and {self.ackers[generation]} both acknowledge in generation {generation}")
        self.acknowledged.add(entry)

    def check_nothing_lost(self, node: str, log: list[Entry]) -> None:
        if missing := self.acknowledged - set(log):
            raise SafetyViolated(f"{node} lets clients write without {sorted(missing)[:5]}")


@dataclass
class DirectoryLink:
    """One peer's view of the directory: `registry.Registry`, as far as a peer uses it."""

    world: World
    name: str

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        world = self.world
        await world.delay(world.slow)
        if not world.linked(self.name, "directory"):
            await asyncio.sleep(1)
            raise Unreachable("cut off")
        fate = world.rng.random()
        if fate < world.flaky / 2:  # applied late, after the caller has given up
            asyncio.get_running_loop().call_later(world.rng.uniform(0, 3), self._put_late, service, meta)
            if world.rng.random() < 0.3:  # and is killed, to come back in a moment
                asyncio.get_running_loop().call_soon(self._kill)
            raise Unreachable("no answer in time")
        written = await world.directory.put_meta(service, meta)
        if fate < world.flaky:
            raise Unreachable("the answer was lost")
        await world.delay()
        return written

    def _kill(self) -> None:
        node = self.world.nodes[self.name]
        if node.peer is not None:
            node.crash()
            asyncio.get_running_loop().call_later(self.world.rng.uniform(0, 1), self._start)

    def _start(self) -> None:
        node = self.world.nodes[self.name]
        if node.peer is None:
            node.start()

    def _put_late(self, service: str, meta: ServiceMeta) -> None:
        put = world_put(self.world.directory, service, meta)
        try:
            put.send(None)
        except (StopIteration, ApiError):
            pass

    async def watch(self, service: str) -> AsyncGenerator[DiscoverdEvent, None]:
        async with aclosing(self.world.directory.watch(service)) as events:
            async for event in events:
                await self.world.delay()
                while not self.world.linked(self.name, "directory"):
                    await asyncio.sleep(0.1)
                yield event


async def world_put(directory: MemoryRegistry, service: str, meta: ServiceMeta) -> None:
    await directory.put_meta(service, meta)


@dataclass
class SimulatedDatabase:
    """A log on a disk, replicated asynchronously, confirmed by name: what PostgreSQL does, in miniature."""

    world: World
    name: str
    disk: Disk
    zero_position: str = "0/00000000"
    running: bool = False
    role: Role = Role.NONE
    held: bool = False
    writable: bool = False
    config: DatabaseConfig | None = None
    synced: Instance | None = None
    flowing: bool = False
    confirmed: dict[str, int] = field(default_factory=dict)
    target: int = 0
    lost_since: float | None = None
    news: int = 0
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # one operation at a time, as a server's owner does them
    waiting: list[tuple[int, Entry, float]] = field(default_factory=list)  # clients: position, what, until when

    def compare(self, a: str, b: str) -> int:
        return (a > b) - (a < b)

    @property
    def position(self) -> str:
        return f"0/{len(self.disk.log):08X}"

    @property
    def primary(self) -> bool:
        return self.running and self.role is Role.PRIMARY and not self.disk.standby

    async def apply(self, config: DatabaseConfig) -> None:
        self.reconsider()
        news = self.news
        async with self.busy:
            await self._bring_to(config, news)

    async def back_again(self) -> None:
        """The server ended by itself and is started again, unless it is held: that ends by `apply` only."""
        async with self.busy:
            config = self.config
            if self.running or self.held or config is None:
                return
            try:
                await self._bring_to(config, self.news)
            except DatabaseError:
                self.config = None

    async def _bring_to(self, config: DatabaseConfig, news: int) -> None:
        same = config == self.config and self.running and not self.held
        self.config = config
        if config.role is Role.NONE:
            self._halt()
            return
        if same:
            return
        self.held = False
        was_primary = self.primary
        self.synced, self.flowing, self.writable = None, False, False
        if config.role is Role.PRIMARY:
            assert config.state is not None
            if not self.running:
                await self.world.delay(1.0)
                self.disk.exists = True
            self.role = Role.PRIMARY
            self.disk.lineage = Lineage(generation=config.state.generation, primary=self.name)
            if self.disk.standby:
                await self.world.delay(0.2)
                self.disk.standby = False
                self.disk.timeline += 1
                self._append(-1)
            self.confirmed.clear()
            self.target = len(self.disk.log)
            self.running = True
            if config.downstream is None:
                self.writable = True
            return
        if was_primary or (self.disk.exists and not self.disk.standby):
            self._halt()
            await self._rewind(config)
        elif not self.disk.exists:
            await self._copy(config)
        if not self.running:
            await self.world.delay(1.0)
            if self.world.rng.random() < 0.3:
                await self._receive(config, news)
        self.role, self.running = config.role, True

    def _halt(self) -> None:
        self.running, self.writable, self.flowing, self.synced, self.role = False, False, False, None, Role.NONE
        self.waiting.clear()

    def _append(self, number: int) -> Entry:
        entry = (self.disk.timeline, self.name, number)
        self.disk.log.append(entry)
        return entry

    def _other(self, instance: Instance | None) -> SimulatedDatabase | None:
        """Another server, if it runs and can be reached."""
        name = instance.meta[ID] if instance is not None else ""
        node = self.world.nodes.get(name)
        if node is None or node.database is None or not self.world.linked(self.name, name):
            return None
        return node.database if node.database.running else None

    async def _rewind(self, config: DatabaseConfig) -> None:
        await self.world.delay(1.0)
        assert config.state is not None
        source = self._other(config.state.primary)
        if source is None or not source.primary:
            raise DatabaseError("no primary to compare with")
        self.disk.lineage = None
        common = 0
        while self.disk.log[common : common + 1] == source.disk.log[common : common + 1] != []:
            common += 1
        del self.disk.log[common:]
        self.disk.standby = True

    async def _receive(self, config: DatabaseConfig, news: int) -> None:
        """Not ready before some log has come from the upstream, which may have died."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self._other(config.upstream) is None:
            if self.news != news or loop.time() - began > 60:
                raise DatabaseError("it starts")
            await self.world.delay(0.05)

    async def _copy(self, config: DatabaseConfig) -> None:
        await self.world.delay(3.0)
        source = self._other(config.upstream)
        if source is None:
            raise DatabaseError("nothing to copy")
        self.disk.log[:] = source.disk.log
        self.disk.timeline, self.disk.lineage = source.disk.timeline, None
        self.disk.exists = self.disk.standby = True

    async def hold(self) -> Held:
        async with self.busy:
            if not self.running:
                raise DatabaseError("does not run")
            self.held, self.writable, self.flowing, self.synced = True, False, False, None
            await self.world.delay(self.world.rng.choice((0.1, 0.1, 0.1, 5)))
            if not self.running:
                raise DatabaseError("crashed meanwhile")
            return Held(received=self.position, usable=self.position)

    async def enable_writes(self, generation: int) -> None:
        config = self.config
        if not self.primary or self.held or self.synced is None or config is None or config.state is None:
            return
        if config.state.generation == generation and not self.writable:
            self.world.check_nothing_lost(self.name, self.disk.log)
            self.writable = True
            self.world.tell(f"{self.name} is writable in generation {generation}")

    async def record_lineage(self, lineage: Lineage) -> None:
        self.disk.lineage = lineage

    async def info(self) -> DatabaseInfo:
        await self.world.delay(0.005)
        upstream = self.config.upstream if self.config is not None else None
        connected = [upstream.meta[ID]] if self.flowing and upstream is not None else []
        for name, node in self.world.nodes.items():
            other = node.database
            above = other.config.upstream if other is not None and other.flowing and other.config else None
            if above is not None and above.meta[ID] == self.name and self.world.linked(name, self.name):
                connected.append(name)
        return DatabaseInfo(
            config=self.config,
            running=self.running,
            synced_downstream=self.synced,
            xlog=self.position if self.running else "",
            user_exists=True,
            read_write=self.writable,
            connected=[key for key in connected if self.running and self.world.rng.random() >= self.world.paranoia],
            lineage=self.disk.lineage,
            timeline=self.disk.timeline,
        )

    def reconsider(self) -> None:
        self.news += 1

    def interrupt(self) -> None:
        return None

    async def stop(self) -> None:
        self._halt()

    # --- endless: replication and clients

    async def replicate(self) -> None:
        """Receive from the upstream, confirm to it; what is received is on the disk."""
        loop = asyncio.get_running_loop()
        lag = 0.03
        while True:
            if self.world.rng.random() < 0.05:
                lag = self.world.rng.choice((0.03, 0.03, 0.03, 0.5))
            await self.world.delay(lag)
            if self.primary and self.config and self.config.downstream and self.synced is None and not self.held:
                name = self.config.downstream.meta[ID]
                if self.confirmed.get(name, -1) >= self.target:
                    self.synced = self.config.downstream
            if not self.running or self.held or self.role not in (Role.SYNC, Role.ASYNC) or self.config is None:
                self.flowing = False
                continue
            upstream = self._other(self.config.upstream)
            if upstream is None:
                self.flowing = False
                continue
            mine, theirs = self.disk.log, upstream.disk.log
            if mine != theirs[: len(mine)]:
                self.flowing = False
                self.lost_since = self.lost_since or loop.time()
                if loop.time() - self.lost_since > 10 and not self.busy.locked():
                    self.lost_since, config = None, self.config
                    async with self.busy:
                        self._halt()
                        try:
                            await self._rewind(config)
                        except DatabaseError:
                            pass  # it goes on with what it has, and tries again
                        self.running, self.role = True, config.role
                continue
            self.lost_since = None
            some = theirs[len(mine) : len(mine) + self.world.rng.randint(1, 3 if lag > 0.1 else 20)]
            mine.extend(some)
            self.disk.timeline = upstream.disk.timeline if mine == theirs else self.disk.timeline
            self.flowing = True
            asyncio.get_running_loop().call_later(
                self.world.rng.uniform(0, 0.02), upstream.confirm, self.name, len(mine), list(mine[-1:])
            )

    def confirm(self, name: str, position: int, last: list[Entry]) -> None:
        """A confirmation under way arrives even when its sender is held or dead by now."""
        if self.running and self.world.linked(name, self.name) and self.disk.log[position - 1 : position] == last:
            self.confirmed[name] = max(self.confirmed.get(name, 0), position)
            self._answer()

    def write(self, number: int) -> None:
        """A client's write; it gives up after two seconds."""
        if self.primary and self.writable:
            entry = self._append(number)
            self.waiting.append((len(self.disk.log), entry, asyncio.get_running_loop().time() + 2))

    def _answer(self) -> None:
        """Tell the clients whose writes the downstream has confirmed."""
        config = self.config
        if not self.primary or self.held or config is None or config.downstream is None or config.state is None:
            return
        reached, now = self.confirmed.get(config.downstream.meta[ID], 0), asyncio.get_running_loop().time()
        waiting, self.waiting = self.waiting, []
        for position, entry, until in waiting:
            if position > reached and now < until:
                self.waiting.append((position, entry, until))
            elif position <= reached and now < until and self.disk.log[position - 1 :][:1] == [entry]:
                self.world.acknowledge(self.name, config.state.generation, entry)


@dataclass
class Ears:
    world: World
    name: str

    async def ask(self, instance: Instance) -> Heard:
        other = self.world.nodes[instance.meta[ID]]
        await self.world.delay()
        if not self.world.linked(self.name, other.name):
            await asyncio.sleep(1)
            return Heard(Answer.SILENT)
        if other.peer is None or other.database is None:
            return Heard(Answer.REFUSED)
        if self.world.rng.random() < self.world.paranoia:
            return Heard(Answer.DOWN)
        info, peer = await other.database.info(), other.peer.info() if other.peer else None
        if peer is None:
            return Heard(Answer.REFUSED)
        return Heard(
            Answer.WELL if info.running else Answer.DOWN,
            id=peer.id,
            role=peer.role,
            generation=peer.state.generation if peer.state else 0,
            lineage=info.lineage.generation if info.lineage else 0,
            timeline=info.timeline,
        )


@dataclass
class Node:
    world: World
    name: str
    group: asyncio.TaskGroup
    disk: Disk = field(default_factory=Disk)
    peer: Peer | None = None
    database: SimulatedDatabase | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def instance(self) -> Instance:
        return Instance.at(f"10.0.0.{self.name[1:]}:5432", "tcp", {ID: self.name})

    def start(self) -> None:
        self.database = SimulatedDatabase(self.world, self.name, self.disk)
        self.peer = Peer(
            DirectoryLink(self.world, self.name),  # type: ignore[arg-type]  # as far as a peer uses it
            SERVICE,
            Me(self.instance, ID, singleton=False),
            self.database,
            LoopClock(),
            Ears(self.world, self.name),
            Backoff(first=timedelta(milliseconds=500), factor=1.5, limit=timedelta(seconds=3), jitter=0),
        )
        bodies = (self.peer.follow(), self.peer.look(), self.peer.act(), self.database.replicate())
        self.tasks = [self.group.create_task(body) for body in bodies]
        self.world.tell(f"{self.name} starts")

    def crash(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.database is not None:
            self.database._halt()
        self.tasks, self.peer, self.database = [], None, None
        self.world.tell(f"{self.name} crashes")

    async def heartbeat(self) -> None:
        """Registered while it lives and reaches the directory; forgotten after the time to live."""
        registered, heard = False, 0.0
        loop = asyncio.get_running_loop()
        while True:
            if self.peer is not None and self.world.linked(self.name, "directory"):
                heard = loop.time()
                if not registered:
                    await self.world.directory.register(SERVICE, self.instance)
                    registered = True
            elif registered and loop.time() - heard > TTL:
                await self.world.directory.deregister(SERVICE, self.instance.id)
                registered = False
            await asyncio.sleep(self.world.rng.uniform(0.2, 0.6))


async def fault(world: World) -> None:
    """One thing goes wrong, for a while."""
    rng = world.rng
    node = rng.choice(list(world.nodes.values()))
    kind = rng.choice(("crash", "crash", "database", "directory", "pair", "flaky", "all"))
    world.tell(f"fault: {kind} {node.name}")
    lasting = rng.choice((0.3, 1, 3, 8, 15, 30)) * rng.uniform(0.5, 1.5)
    if kind == "crash" and node.peer is not None:
        node.crash()
        await asyncio.sleep(lasting)
        if node.peer is None:
            node.start()
    elif kind == "database" and node.database is not None:
        database = node.database
        database._halt()
        await asyncio.sleep(min(lasting, 5))
        if node.database is database:
            node.tasks.append(node.group.create_task(database.back_again()))
    elif kind in ("directory", "pair"):
        other = "directory" if kind == "directory" else rng.choice([n for n in world.nodes if n != node.name])
        pair = frozenset({node.name, other})
        world.cut.add(pair)
        await asyncio.sleep(lasting)
        world.cut.discard(pair)
    elif kind == "flaky":
        world.flaky = 0.6
        await asyncio.sleep(lasting)
        world.flaky = 0.0
    elif kind == "all" and rng.random() < 0.3:
        for one in world.nodes.values():
            if one.peer is not None:
                one.crash()
        for one in world.nodes.values():
            await asyncio.sleep(rng.uniform(0, 5))
            if one.peer is None:
                one.start()


async def clients(world: World) -> None:
    number = 0
    while True:
        await asyncio.sleep(world.rng.uniform(0.005, 0.05))
        for node in world.nodes.values():
            if node.database is not None and node.database.writable:
                number += 1
                node.database.write(number)


async def simulate(seed: int, peers: int = 3, faults: int = 12, paranoia: float = 0.0) -> World:
    """A history full of faults; then everything heals, and the cluster has to be whole within two minutes.

    With `paranoia` healthy neighbours are taken for dead all the time: safety must not depend on the detection.
    """
    world = World(random.Random(seed), paranoia=paranoia, slow=1.5 if paranoia else 0.02)
    await world.directory.create(SERVICE, LeaderType.MANUAL)
    async with asyncio.TaskGroup() as group:
        world.nodes = {f"n{i}": Node(world, f"n{i}", group) for i in range(1, peers + 1)}
        tasks = [group.create_task(clients(world))]
        for node in world.nodes.values():
            tasks.append(group.create_task(node.heartbeat()))
            node.start()
            await world.delay(2)
        troubles = []
        for _ in range(faults):
            await asyncio.sleep(world.rng.choice((0.2, 1, 5, 20)) * world.rng.random())
            troubles.append(group.create_task(fault(world)))
        for trouble in troubles:
            await trouble
        world.paranoia, world.slow = 0.0, 0.02
        world.tell("healed")
        await _whole(world)
        for task in tasks + [task for node in world.nodes.values() for task in node.tasks]:
            task.cancel()
    return world


async def _whole(world: World) -> None:
    before = len(world.acknowledged)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 120
    while loop.time() < deadline:
        await asyncio.sleep(0.5)
        state = await stored(world)
        if state is None or state.sync is None or len(state.asyncs or []) != len(world.nodes) - 2:
            continue
        if len(world.acknowledged) > before + 20 and all(
            node.database is not None and (node.database.flowing or node.database.writable)
            for node in world.nodes.values()
        ):
            return
    raise SafetyViolated(f"not whole two minutes after the last fault: {await stored(world)}")


async def stored(world: World) -> ClusterState | None:
    meta = await world.directory.get_meta(SERVICE)
    return parse_state(meta.data) if meta is not None else None
