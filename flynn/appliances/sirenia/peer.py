"""The loop of one peer: follow the directory, decide by the rules, move the local database.

One task follows the directory and keeps the newest picture; another decides and acts, one thing after the other. A
database operation may take minutes meanwhile: what arrives then is seen afterwards, as one picture.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from flynn.aio.clock import Clock
from flynn.appliances.sirenia.cluster_state import BadClusterState, ClusterState, Role, parse_state
from flynn.appliances.sirenia.database import Database, DatabaseConfig, DatabaseError
from flynn.appliances.sirenia.evaluate import Cluster, Decision, Me, evaluate
from flynn.discoverd.registry import Registry
from flynn.discoverd.view import View
from flynn.types.codec import Wire, always, builtins
from flynn.types.errors import ApiError, ObjectExists, PreconditionFailed
from flynn.types.instance import EventKind, Instance, ServiceMeta

log = logging.getLogger(__name__)

RETRY = timedelta(seconds=1)  # after a write or a database operation that failed
DATABASE_ROLES = frozenset((Role.PRIMARY, Role.SYNC, Role.ASYNC))


class PeerInfo(Wire):
    id: str
    role: Role
    reason: str = ""
    retry_pending: datetime | None = None  # since when the database refuses to become what it should be
    state: ClusterState | None = always(None)
    peers: list[Instance] | None = always(None)


@dataclass(slots=True)
class Peer:
    """One member of the cluster called `service`. `follow` and `act` are endless and belong to a supervisor."""

    registry: Registry
    service: str
    me: Me
    database: Database
    clock: Clock

    role: Role = Role.UNKNOWN
    reason: str = "starting"
    retry_pending: datetime | None = None
    refusal: str = ""  # why it is pending
    cluster: Cluster = field(default_factory=Cluster)
    _index: int = 0  # log index of the newest state known
    _current: bool = False  # the directory has told all there is
    _stopped: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the database is being moved

    def info(self) -> PeerInfo:
        return PeerInfo(
            id=self.me.id,
            role=self.role,
            reason=self.reason,
            retry_pending=self.retry_pending,
            state=self.cluster.state,
            peers=list(self.cluster.peers) if self._current else None,
        )

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
        self.cluster = replace(self.cluster, peers=peers, leader=view.leader)
        if view.meta is not None and view.meta.index > self._index:
            try:
                self._adopt(parse_state(view.meta.data), view.meta.index)
            except BadClusterState as error:
                log.error("bad cluster state ignored", extra={"service": self.service, "error": error})
        self._changed.set()

    def _adopt(self, state: ClusterState, index: int) -> None:
        self.cluster, self._index = replace(self.cluster, state=state), index

    async def act(self) -> None:
        """Decide and act, for ever.

        Raises:
            Misconfigured: nothing this peer could do would be right.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._stopped:
                continue
            async with self._busy:
                settled = await self._step()
            if not settled:
                await self.clock.sleep(RETRY)
                self._changed.set()

    async def _step(self) -> bool:
        """One decision with all it asks for; False if it has to be tried again."""
        decision = evaluate(self.me, self.cluster, self.database.zero_position, self.clock.now())
        if decision.write is not None and not await self._write(decision.write):
            return False
        if self.role is not decision.role:
            log.info("role", extra={"was": self.role, "now": decision.role, "reason": decision.reason})
        self.role, self.reason = decision.role, decision.reason
        if decision.role is Role.UNKNOWN:
            return True
        try:
            await self.database.apply(self._wanted(decision))
        except DatabaseError as error:
            if str(error) != self.refusal:
                log.error("the database is not as it should be", extra={"role": decision.role, "error": error})
            self.refusal = str(error)
            self.retry_pending = self.retry_pending or self.clock.now()
            return False
        self.retry_pending, self.refusal = None, ""
        return True

    def _wanted(self, decision: Decision) -> DatabaseConfig:
        if decision.role in DATABASE_ROLES:
            return DatabaseConfig(role=decision.role, state=self.cluster.state)
        return DatabaseConfig(role=Role.NONE)

    async def _write(self, state: ClusterState) -> bool:
        """Write the state by compare-and-set, with its primary as the service's leader."""
        assert state.primary is not None
        meta = ServiceMeta(data=builtins(state), index=self._index, leader_id=state.primary.id)
        try:
            written = await self.registry.put_meta(self.service, meta)
        except (ObjectExists, PreconditionFailed):
            log.info("somebody else wrote the cluster state", extra={"service": self.service})
            return False
        except ApiError as error:
            log.warning("could not write the cluster state", extra={"service": self.service, "error": error})
            return False
        log.info("cluster state written", extra={"generation": state.generation, "index": written.index})
        self._adopt(state, written.index)
        return True

    async def stop(self) -> None:
        """Stop reacting, then stop the database. A second call does nothing."""
        self._stopped = True
        async with self._busy:
            await self.database.stop()
