"""The loop of one peer: follow the directory, decide by the rules, move the local database.

One task follows the directory and keeps the newest picture, one asks the neighbours, another decides and acts, one
thing after the other. A database operation may take minutes meanwhile: what arrives then is seen afterwards, as one
picture. The database is told that there is something new, in case that it waits for somebody who has died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from flynn.aio.backoff import Backoff
from flynn.aio.clock import Clock
from flynn.appliances.sirenia.cluster_state import BadClusterState, ClusterState, Freeze, Lineage, Role, parse_state
from flynn.appliances.sirenia.database import Database, DatabaseConfig, DatabaseError, DatabaseInfo
from flynn.appliances.sirenia.evaluate import Cluster, Decision, Me, evaluate
from flynn.appliances.sirenia.neighbours import Hermit, Neighbours
from flynn.appliances.sirenia.suspicion import Answer, Doubt, doubted, still_awaited
from flynn.appliances.sirenia.takeover import Refused, Takeover, declare, follows, may_be_replaced_by
from flynn.discoverd.registry import Registry
from flynn.discoverd.view import View
from flynn.types.codec import Wire, always, builtins
from flynn.types.codec import replace as changed
from flynn.types.errors import ApiError, Conflict, ObjectExists, PreconditionFailed
from flynn.types.instance import EventKind, Instance, ServiceMeta

log = logging.getLogger(__name__)

RETRY = Backoff(first=timedelta(milliseconds=500), factor=1.5, limit=timedelta(seconds=3), jitter=0.3)
"""After a takeover that was refused, a write or a database operation that failed."""

LOOK = timedelta(milliseconds=250)  # a query of the local database
LOOK_SOON = timedelta(milliseconds=50)  # while a new generation begins and everybody waits
DEAF = 2.0  # seconds for which a candidate that did not answer is passed over
LOOK_ALONE = timedelta(seconds=5)  # in a cluster of one there is hardly anything to see
DATABASE_ROLES = frozenset((Role.PRIMARY, Role.SYNC, Role.ASYNC))


class PeerInfo(Wire):
    id: str
    role: Role
    reason: str = ""
    retry_pending: datetime | None = None  # since when the database refuses to become what it should be
    gone: list[str] = []  # neighbours that are registered but dead, as far as this peer can tell
    state: ClusterState | None = always(None)
    peers: list[Instance] | None = always(None)


@dataclass(slots=True)
class Peer:
    """One member of the cluster called `service`. `follow`, `look` and `act` are endless and belong to a supervisor."""

    registry: Registry
    service: str
    me: Me
    database: Database
    clock: Clock
    neighbours: Neighbours = field(default_factory=Hermit)
    retry: Backoff = RETRY

    role: Role = Role.UNKNOWN
    reason: str = "starting"
    retry_pending: datetime | None = None
    refusal: str = ""  # why it is pending
    cluster: Cluster = field(default_factory=Cluster)
    _index: int = 0  # log index of the newest state known
    _open: int | None = None  # a takeover may have been written on this index, and nobody knows yet whether it counts
    _current: bool = False  # the directory has told all there is
    _seen: set[str] = field(default_factory=set)  # who was ever registered since this peer started
    _doubt: Doubt | None = None
    _deaf: dict[str, float] = field(default_factory=dict)  # candidates that did not answer, and until when that counts
    _beginning: bool = False
    _no_takeover: str = ""  # why the last attempt was refused
    _stopped: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the database is being moved

    def info(self) -> PeerInfo:
        return PeerInfo(
            id=self.me.id,
            role=self.role,
            reason=self.reason,
            retry_pending=self.retry_pending,
            gone=sorted(self.cluster.gone),
            state=self.cluster.state,
            peers=list(self.cluster.peers) if self._current else None,
        )

    # --- the directory

    async def follow(self) -> None:
        """Keep `cluster` as the directory tells it."""
        view = View()
        async with aclosing(self.registry.watch(self.service)) as events:
            async for event in events:
                view.apply(event)
                self._current = self._current or event.kind is EventKind.CURRENT
                if self._current:
                    self._see(view)

    def _see(self, view: View) -> None:
        peers = tuple(sorted(view.instances.values(), key=lambda instance: instance.index))
        self._seen.update(self.me.identity(peer) for peer in peers)
        self.cluster = replace(self.cluster, peers=peers, leader=view.leader)
        if view.meta is not None and view.meta.index > self._index:
            try:
                state, first = parse_state(view.meta.data), self._index == 0
                self._adopt(state, view.meta.index)
                if first and may_be_replaced_by(self.me.is_me, state):
                    self._open = self._index
            except BadClusterState as error:
                log.error("bad cluster state ignored", extra={"service": self.service, "error": error})
        self._changed.set()

    def _adopt(self, state: ClusterState, index: int) -> None:
        self.cluster, self._index = replace(self.cluster, state=state), index
        self.database.reconsider()

    # --- the neighbours

    async def look(self) -> None:
        """Keep what `cluster` knows beyond the directory: who is dead, who is awaited, whether writes are possible."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            state = self.cluster.state
            alone = state is None or state.singleton
            pause = LOOK_ALONE if alone and self.me.singleton else LOOK_SOON if self._beginning else LOOK
            await asyncio.sleep(pause.total_seconds())
            if self._stopped or alone or self.role not in DATABASE_ROLES:
                self._learn(gone=frozenset(), established=False)
                continue
            info = await self.database.info()
            await self._question(info)
            self._beginning = False
            await self._trace(info)
            await self._begin(info)
            assert state is not None  # one that is alone has been sorted out
            members = (state.primary, state.sync, *(state.asyncs or ()))
            self._learn(
                gone=self._gone(loop.time()),
                awaited=still_awaited(
                    (self.me.identity(member) for member in members if member is not None),
                    self._seen,
                    started,
                    loop.time(),
                ),
                established=self.role is Role.PRIMARY
                and info.read_write
                and info.synced_downstream is not None
                and self.me.identity(info.synced_downstream) == self.me.identity(state.sync),
            )

    async def _begin(self, info: DatabaseInfo) -> None:
        """Let clients write when the sync has caught up *and* could take over: it knows that its data belong here."""
        state, synced = self.cluster.state, info.synced_downstream
        if self.role is not Role.PRIMARY or info.read_write or state is None or synced is None or not info.running:
            return
        self._beginning = True
        heard = await self.neighbours.ask(synced)
        if heard.id == self.me.identity(state.sync) and heard.lineage == state.generation:
            await self.database.enable_writes(state.generation)

    def _learn(
        self, *, gone: frozenset[str], established: bool, awaited: frozenset[str] | None = None
    ) -> None:  # fmt: skip
        known = self.cluster
        self.cluster = replace(
            known, gone=gone, established=established, awaited=known.awaited if awaited is None else awaited
        )
        if self.cluster != known:
            self._changed.set()

    async def _question(self, info: DatabaseInfo) -> None:
        """Ask the other half of primary and sync whether it lives, if replication with it does not flow."""
        counterpart = self._counterpart()
        # A primary that does not run yet has nothing that its sync could be without.
        starting = self.role is Role.PRIMARY and not (info.running and info.xlog)
        if counterpart is None or starting:
            self._doubt = None
            return
        key = self.me.identity(counterpart)
        answer = Answer.WELL
        if key not in info.connected:
            heard = await self.neighbours.ask(counterpart)
            # Whoever has the address now is somebody else: the one we mean is not there.
            answer = Answer.REFUSED if heard.id not in ("", key) else heard.answer
        before = self._doubt
        self._doubt = doubted(before, key, answer, asyncio.get_running_loop().time())
        if (before is None) != (self._doubt is None):
            log.info("neighbour", extra={"neighbour": key, "answer": answer})

    def _counterpart(self) -> Instance | None:
        state = self.cluster.state
        if state is None or self.role not in (Role.PRIMARY, Role.SYNC):
            return None
        member = state.sync if self.role is Role.PRIMARY else state.primary
        return self._registered(member)

    def _registered(self, member: Instance | None) -> Instance | None:
        """The present address of a member; None if it is not registered."""
        key = self.me.identity(member)
        return next((peer for peer in reversed(self.cluster.peers) if self.me.identity(peer) == key), None)

    def _gone(self, now: float) -> frozenset[str]:
        doubt = self._doubt
        dead = {doubt.neighbour} if doubt is not None and doubt.is_gone(now) else set()
        return frozenset(dead | {key for key, until in self._deaf.items() if now < until})

    async def _trace(self, info: DatabaseInfo) -> None:
        """Record that the data follow the present generation, once the upstream says so of its own."""
        state, config = self.cluster.state, info.config
        if state is None or config is None or config.upstream is None or config.state is None:
            return
        if config.role is not self.role or config.state.generation != state.generation:
            return
        if info.lineage is not None and info.lineage.generation >= state.generation:
            return
        upstream, primary = self.me.identity(config.upstream), self.me.identity(state.primary)
        if upstream not in info.connected:
            return
        self._beginning = True
        heard = await self.neighbours.ask(config.upstream)
        belongs = heard.lineage == state.generation or (
            upstream == primary and heard.role is Role.PRIMARY and heard.generation == state.generation
        )
        # A copy that went another way is let in on the old timeline for a moment, never on the new one.
        if heard.id != upstream or not belongs or not heard.timeline or heard.timeline != info.timeline:
            return
        again = await self.database.info()
        if again.config == config and upstream in again.connected and again.timeline == heard.timeline:
            lineage = Lineage(generation=state.generation, primary=primary, upstream=upstream)
            await self.database.record_lineage(lineage)
            log.info("data belong to the generation", extra={"generation": state.generation, "upstream": upstream})

    # --- decisions

    async def act(self) -> None:
        """Decide and act, for ever.

        Raises:
            Misconfigured: nothing this peer could do would be right.
        """
        delays: Iterator[float] | None = None
        while True:
            try:
                async with asyncio.timeout(None if delays is None else next(delays)):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if self._stopped:
                continue
            async with self._busy:
                settled = await self._step()
            delays = None if settled else delays or self.retry.delays()

    async def _step(self) -> bool:
        """One decision with all it asks for; False if it has to be tried again.

        What arrives meanwhile belongs to the next one: nothing is written over a state that was not decided upon.
        """
        state, index = self.cluster.state, self._index
        decision = evaluate(self.me, self.cluster, self.database.zero_position, self.clock.now())
        self._take_role(decision)
        settled = True
        if decision.takeover is not None:
            if await self._take_over(decision.takeover, index):
                self._changed.set()  # a new generation: decide again, by the same rules as everybody else
                return True
            settled = False
        elif decision.write is not None:
            new = decision.write != state
            settled = await self._write(decision.write, index)
            if settled and new:
                self._changed.set()
                return True
        if not await self._certain():
            return False
        if self.cluster.state != state:
            self._changed.set()  # the role may be another one by now
            return True
        if state is None:
            return settled and decision.role in (Role.UNKNOWN, Role.UNASSIGNED)
        return await self._move(decision) and settled

    def _take_role(self, decision: Decision) -> None:
        if decision.role is Role.PRIMARY and self.cluster.state is None:
            return  # only when the first state has been written
        if self.role is not decision.role:
            log.info("role", extra={"was": self.role, "now": decision.role, "reason": decision.reason})
        self.role, self.reason = decision.role, decision.reason

    async def _move(self, decision: Decision) -> bool:
        """Bring the database to what the role asks for."""
        if decision.role is Role.UNKNOWN:
            return True
        config = DatabaseConfig(role=Role.NONE)
        if decision.role in DATABASE_ROLES:
            config = DatabaseConfig(
                role=decision.role,
                upstream=decision.upstream,
                downstream=decision.downstream,
                state=self.cluster.state,
            )
        try:
            await self.database.apply(config)
        except DatabaseError as error:
            if str(error) != self.refusal:
                log.error("the database is not as it should be", extra={"role": decision.role, "error": error})
            self.refusal = str(error)
            self.retry_pending = self.retry_pending or self.clock.now()
            return False
        self.retry_pending, self.refusal = None, ""
        return True

    async def _take_over(self, takeover: Takeover, index: int) -> bool:
        """Declare a new generation in place of the state at `index`, which is the present one.

        False: refused, failed or lost; the database may then be held still.
        """
        state = self.cluster.state
        assert state is not None  # takeovers replace one
        info = await self.database.info()
        if not info.running:
            return self._refused(takeover, "the database does not run")
        if not self._entitled(info, state):
            return self._refused(takeover, f"the data do not belong to generation {state.generation}")
        candidate = takeover.state.sync
        assert candidate is not None  # that is what a takeover needs
        heard = await self.neighbours.ask(candidate)
        if heard.answer in (Answer.REFUSED, Answer.SILENT):
            self._deaf[self.me.identity(candidate)] = asyncio.get_running_loop().time() + DEAF
            self._learn(gone=self.cluster.gone | {self.me.identity(candidate)}, established=False)
            return self._refused(takeover, f"the new sync would be {candidate.addr}, which does not answer")
        try:
            held = await self.database.hold()
        except DatabaseError as error:
            return self._refused(takeover, str(error))
        # To be held, a database that lost its way is waited for; it may have come back with other data.
        if not self._entitled(await self.database.info(), state):
            return self._refused(takeover, f"the data do not belong to generation {state.generation} any more")
        new = declare(takeover, held.received, held.usable, self.database.compare)
        if isinstance(new, Refused):
            return self._refused(takeover, new.reason)
        log.info("taking over", extra={"reason": takeover.reason, "generation": new.generation, "at": new.init_wal})
        if await self._write(new, index):
            self._open = None
            return True
        self._open = index
        return False

    def _entitled(self, info: DatabaseInfo, state: ClusterState) -> bool:
        """Whether the position of these data can be compared with that of the state."""
        return self.me.is_me(state.primary) or follows(info.lineage, state, self.me.identity(state.primary))

    def _refused(self, takeover: Takeover, reason: str) -> bool:
        if reason != self._no_takeover:
            log.warning("no takeover", extra={"why": takeover.reason, "refused": reason})
        self._no_takeover = reason
        self.reason = f"{self.reason}; no takeover: {reason}"
        return False

    async def _certain(self) -> bool:
        """Whether an attempted takeover has come to its end, so that the database may acknowledge again.

        A write whose answer was lost may count all the same, or count later: also one that this peer was about when it
        was killed. It cannot any more once the state has got a newer index: somebody else's, or that of the same state
        written once more.
        """
        if self._open is None or self._index > self._open:
            self._open = None
            return True
        state = self.cluster.state
        assert state is not None  # a takeover replaces one
        if await self._write(state, self._open):
            self._open = None
            return True
        return False

    async def _write(self, state: ClusterState, index: int) -> bool:
        """Write the state in place of the one at `index` (0 = there is none), with its primary as the service's leader.

        The index is that of the state it was decided upon. A newer one that arrived since is not ours to replace.
        """
        assert state.primary is not None
        meta = ServiceMeta(data=builtins(state), index=index, leader_id=state.primary.id)
        try:
            written = await self.registry.put_meta(self.service, meta)
        except (ObjectExists, PreconditionFailed):
            log.info("somebody else wrote the cluster state", extra={"service": self.service})
            return False
        except ApiError as error:
            log.warning("could not write the cluster state", extra={"service": self.service, "error": error})
            return False
        log.info("cluster state written", extra={"generation": state.generation, "index": written.index})
        if written.index > self._index:
            self._adopt(state, written.index)
        return True

    # --- what operators ask for

    async def freeze(self, reason: str) -> None:
        """Nobody takes over and no peer is added until `unfreeze`. Raises Conflict if somebody else wrote meanwhile."""
        await self._edit(lambda state: changed(state, freeze=Freeze(frozen_at=self.clock.now(), reason=reason)))

    async def unfreeze(self) -> None:
        await self._edit(lambda state: changed(state, freeze=None))

    async def _edit(self, edit: Callable[[ClusterState], ClusterState]) -> None:
        async with self._busy:
            state = self.cluster.state
            if state is None or not await self._write(edit(state), self._index):
                raise Conflict("the cluster state changed meanwhile, or there is none yet; try again")
        self._changed.set()

    async def stop(self) -> None:
        """Stop reacting, then stop the database. A second call does nothing."""
        self._stopped = True
        self.database.interrupt()
        async with self._busy:
            await self.database.stop()
