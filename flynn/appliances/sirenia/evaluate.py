"""What a peer has to do, given what it knows. Pure. See spec/appliances section 4.

One pass looks at the whole picture and returns one decision: the role to have from now on with its neighbours in the
chain, and perhaps a state to write first or a takeover to attempt. It is asked again whenever anything changes, so a
decision that is lost or late does no harm. Roles follow from the state alone, whatever the role was before.

    primary -> sync -> async[0] -> async[1] ...      who replicates to whom

Deviations from the original, on purpose: a deposed peer that is back becomes an async as soon as a new primary and its
sync are established (its database knows how to rejoin, and `takeover` asks for a lineage), the records of all members
follow their addresses, and the list of the deposed is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze, Role
from flynn.appliances.sirenia.takeover import Takeover
from flynn.types.codec import replace
from flynn.types.instance import Instance

SINGLETON_REASON = "cluster started in singleton mode"
DEPOSED_LIMIT = 8  # every deploy deposes one, and those whose volume is gone never come back to be rebuilt


@dataclass(frozen=True, slots=True)
class Me:
    """The peer itself. Its logical identity outlives the container, its discoverd id does not."""

    instance: Instance
    id_key: str  # which key of an instance's metadata carries the logical identity
    singleton: bool  # configured to be a cluster of one

    @property
    def id(self) -> str:
        return self.identity(self.instance)

    def identity(self, instance: Instance | None) -> str:
        """The logical identity; the discoverd id stands in for a record that carries none."""
        return "" if instance is None else instance.meta.get(self.id_key) or instance.id

    def is_me(self, other: Instance | None) -> bool:
        return other is not None and self.identity(other) == self.id


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the directory says, and what is known about neighbours beyond that (logical ids)."""

    peers: tuple[Instance, ...] = ()  # in order of registration: the first one may set a cluster up
    leader: Instance | None = None
    state: ClusterState | None = None
    gone: frozenset[str] = frozenset()  # registered, but known to be dead
    awaited: frozenset[str] = frozenset()  # not registered, but expected to be back in a moment
    established: bool = False  # this peer is a writable primary whose sync has caught up


@dataclass(frozen=True, slots=True)
class Decision:
    role: Role
    reason: str
    write: ClusterState | None = None  # to be written first; losing the race for it means to decide again
    takeover: Takeover | None = None  # to be attempted; refused or lost means to decide again
    upstream: Instance | None = None
    downstream: Instance | None = None


class Misconfigured(Exception):
    """The peer's configuration and the cluster it finds contradict each other; only a person can resolve that."""


def evaluate(me: Me, cluster: Cluster, zero_position: str, now: datetime) -> Decision:
    """Decide for `me`; `zero_position` is the log position before anything was written.

    Raises:
        Misconfigured: a singleton peer meets a replicated cluster.
    """
    state = cluster.state
    if state is None:
        return _first_setup(me, cluster, zero_position, now)
    if me.singleton and not state.singleton:
        raise Misconfigured("this peer is configured as a singleton, but the cluster is a replicated one")
    view = _View(me, cluster, state)
    if me.is_me(state.primary):
        return _as_primary(view)
    if not state.singleton and me.is_me(state.sync):
        return _as_sync(view)
    for place, peer in enumerate(view.asyncs):
        if me.is_me(peer) and not state.singleton:
            above = view.asyncs[place - 1] if place else state.sync
            below = view.asyncs[place + 1] if place + 1 < len(view.asyncs) else None
            reason = f"async {place} of generation {state.generation}"
            return Decision(Role.ASYNC, reason, upstream=view.record(above), downstream=view.record(below))
    if any(me.is_me(peer) for peer in state.deposed):
        return Decision(Role.DEPOSED, "was primary of an earlier generation")
    if state.singleton:
        return Decision(Role.UNASSIGNED, "another peer is the only member of this singleton cluster")
    return Decision(Role.UNASSIGNED, "the primary has not taken this peer in yet")


@dataclass(frozen=True, slots=True)
class _View:
    """One picture of the cluster with the questions the rules ask of it."""

    me: Me
    cluster: Cluster
    state: ClusterState

    @property
    def asyncs(self) -> list[Instance]:
        return self.state.asyncs or []

    @property
    def registered(self) -> dict[str, Instance]:
        """By logical identity. A container that was replaced may be listed twice for a while: the later one counts."""
        return {self.me.identity(peer): peer for peer in self.cluster.peers}

    def present(self, member: Instance | None) -> bool:
        key = self.me.identity(member)
        if key == self.me.id or key in self.cluster.awaited:
            return True
        return key in self.registered and key not in self.cluster.gone

    def record(self, member: Instance | None) -> Instance | None:
        """Where a member is now: its registration, else what the state says about it."""
        return None if member is None else self.registered.get(self.me.identity(member), member)


def _first_setup(me: Me, cluster: Cluster, zero_position: str, now: datetime) -> Decision:
    peers = tuple({me.identity(peer): peer for peer in cluster.peers}.values())
    if not peers:
        return Decision(Role.UNKNOWN, "no peer is registered yet, not even this one")
    if not me.is_me(peers[0]):
        return Decision(Role.UNASSIGNED, "another peer registered first and sets the cluster up")
    if not me.singleton and len(peers) < 2:
        return Decision(Role.UNASSIGNED, "waiting for a second peer to set the cluster up")
    state = ClusterState(generation=1, init_wal=zero_position, primary=me.instance)
    if me.singleton:
        freeze = Freeze(frozen_at=now, reason=SINGLETON_REASON)
        alone = replace(state, singleton=True, freeze=freeze)
        return Decision(Role.PRIMARY, "first peer of a new cluster of one", alone)
    members = replace(state, sync=peers[1], asyncs=list(peers[2:]))
    return Decision(Role.PRIMARY, "first peer of a new cluster", members, downstream=peers[1])


def _as_primary(view: _View) -> Decision:
    me, state = view.me, view.state
    decision = Decision(
        Role.PRIMARY, f"primary of generation {state.generation}", downstream=view.record(state.sync)
    )  # fmt: skip
    if (refreshed := _refreshed(view)) is not None:
        return _writing(decision, refreshed, "an address or the leader needs an update")
    if state.freeze is not None:
        return decision
    if state.singleton:
        return decision if me.singleton else _to_replicated(view, decision)
    if not view.present(state.sync) and (takeover := _replace_sync(view)) is not None:
        return _attempting(decision, takeover)
    if (taken_in := _reconciled(view)) is not None:
        return _writing(decision, taken_in, "peers came or went")
    return decision


def _as_sync(view: _View) -> Decision:
    state = view.state
    decision = Decision(
        Role.SYNC,
        f"sync of generation {state.generation}",
        upstream=view.record(state.primary),
        downstream=view.record(view.asyncs[0]) if view.asyncs else None,
    )
    if view.present(state.primary):
        return decision
    if state.freeze is not None:
        return _because(decision, f"the primary is gone, but the cluster is frozen: {state.freeze.reason}")
    candidates = _present_asyncs(view)
    if not candidates:
        return _because(decision, "the primary is gone, but there is nobody to be the new sync")
    assert state.primary is not None  # a state without one is not parsed
    deposed = [*(peer for peer in state.deposed if not _same(view, peer, state.primary)), state.primary]
    return _attempting(
        decision, Takeover("the primary is gone", _next_generation(view, candidates, deposed), state.init_wal)
    )


def _replace_sync(view: _View) -> Takeover | None:
    """A new sync for a primary whose sync is gone; None if nobody could be it. A vanished sync is not deposed."""
    candidates = _present_asyncs(view)
    if not candidates:
        return None
    new = _next_generation(view, candidates, view.state.deposed)
    return Takeover("the sync is gone", new, view.state.init_wal)


def _to_replicated(view: _View, decision: Decision) -> Decision:
    """A cluster of one that is not to be one any more: the other peers become its members."""
    others = [peer for key, peer in view.registered.items() if key != view.me.id and view.present(peer)]
    if not others:
        return _because(decision, "waiting for a second peer to replicate to")
    # The last one, as ever: it registered for this purpose, while earlier ones may be leftovers.
    new = _next_generation(view, [others[-1], *others[:-1]], view.state.deposed)
    return _attempting(decision, Takeover("from a cluster of one to a replicated one", new, ""))


def _next_generation(view: _View, standbys: Sequence[Instance], deposed: Sequence[Instance]) -> ClusterState:
    members = {view.me.id, *(view.me.identity(peer) for peer in standbys)}
    return ClusterState(
        generation=view.state.generation + 1,
        primary=view.me.instance,
        sync=standbys[0],
        asyncs=list(standbys[1:]),
        deposed=[peer for peer in deposed if view.me.identity(peer) not in members][-DEPOSED_LIMIT:],
    )


def _present_asyncs(view: _View) -> list[Instance]:
    # One that is only awaited would do as an async, but not as the sync that everybody waits for.
    return [
        peer
        for peer in (view.registered.get(view.me.identity(peer)) for peer in view.asyncs)
        if peer is not None and view.me.identity(peer) not in view.cluster.gone
    ]


def _reconciled(view: _View) -> ClusterState | None:
    """The state with the asyncs that are there, or None if it says so already."""
    identity, state = view.me.identity, view.state
    kept = [peer for peer in view.asyncs if view.present(peer)]
    members = {identity(peer) for peer in (state.primary, state.sync, *kept)}
    deposed = {identity(peer) for peer in state.deposed}
    new = [
        peer
        for key, peer in view.registered.items()
        # The data of a deposed peer may be the last copy of something until the new pair works.
        if key not in members and view.present(peer) and (view.cluster.established or key not in deposed)
    ]
    if not new and len(kept) == len(view.asyncs):
        return None
    back = {identity(peer) for peer in new}
    return replace(
        state, asyncs=[*kept, *new], deposed=[peer for peer in state.deposed if identity(peer) not in back]
    )  # fmt: skip


def _refreshed(view: _View) -> ClusterState | None:
    """The state with everybody's present address, if it has old ones or the service's leader is not me.

    A container that starts again on the same volume is the same peer at another address. Only a registered instance
    can lead, so the leader is judged once I am among the peers.
    """
    me, cluster, state = view.me, view.cluster, view.state

    def renewed(member: Instance) -> Instance:
        now = me.instance if me.is_me(member) else view.record(member)
        assert now is not None
        return now if (now.id, now.meta) != (member.id, member.meta) else member

    assert state.primary is not None  # the caller found me there
    fresh = replace(
        state,
        primary=renewed(state.primary),
        sync=renewed(state.sync) if state.sync is not None else None,
        asyncs=[renewed(peer) for peer in state.asyncs] if state.asyncs is not None else None,
    )
    registered = any(peer.id == me.instance.id for peer in cluster.peers)
    leaderless = registered and (cluster.leader is None or cluster.leader.id != me.instance.id)
    return fresh if leaderless or fresh != state else None


def _same(view: _View, a: Instance, b: Instance) -> bool:
    return view.me.identity(a) == view.me.identity(b)


def _because(decision: Decision, reason: str) -> Decision:
    return Decision(
        decision.role, f"{decision.reason}; {reason}", None, None, decision.upstream, decision.downstream
    )  # fmt: skip


def _writing(decision: Decision, state: ClusterState, reason: str) -> Decision:
    text = f"{decision.reason}; {reason}"
    return Decision(decision.role, text, state, None, decision.upstream, decision.downstream)


def _attempting(decision: Decision, takeover: Takeover) -> Decision:
    text = f"{decision.reason}; {takeover.reason}"
    return Decision(decision.role, text, None, takeover, decision.upstream, decision.downstream)
