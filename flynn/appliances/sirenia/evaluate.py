"""What a peer has to do, given what it knows. Pure. See spec/appliances section 4.

One pass looks at the whole picture and returns one decision: the role to have from now on, and perhaps a new cluster
state to write first. It is asked again whenever anything changes, so a decision that is lost or late does no harm.

The rules here are those of a cluster of one. The branches of a replicated cluster (initial set-up with a sync, sync and
async roles, takeover) belong beside `_first_setup` and `_role_in`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze, Role
from flynn.types.codec import replace
from flynn.types.instance import Instance

SINGLETON_REASON = "cluster started in singleton mode"


@dataclass(frozen=True, slots=True)
class Me:
    """The peer itself. Its logical identity outlives the container, its discoverd id does not."""

    instance: Instance
    id_key: str  # which key of an instance's metadata carries the logical identity
    singleton: bool  # configured to be a cluster of one

    @property
    def id(self) -> str:
        return self.instance.meta[self.id_key]

    def is_me(self, other: Instance | None) -> bool:
        return other is not None and other.meta.get(self.id_key) == self.id


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the directory says. `peers` in order of registration: the first one may set a cluster up."""

    peers: tuple[Instance, ...] = ()
    leader: Instance | None = None
    state: ClusterState | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    role: Role
    reason: str
    write: ClusterState | None = None  # to be written first; losing the race for it means to decide again


class Misconfigured(Exception):
    """The peer's configuration and the cluster it finds contradict each other; only a person can resolve that."""


def evaluate(me: Me, cluster: Cluster, zero_position: str, now: datetime) -> Decision:
    """Decide for `me`; `zero_position` is the log position before anything was written.

    Raises:
        Misconfigured: a singleton peer meets a replicated cluster, or the other way round.
    """
    state = cluster.state
    if state is None:
        return _first_setup(me, cluster.peers, zero_position, now)
    if me.singleton and not state.singleton:
        raise Misconfigured("this peer is configured as a singleton, but the cluster is a replicated one")
    if not me.singleton:
        raise Misconfigured("replicated clusters are not supported yet: SINGLETON must be true")
    role, reason = _role_in(me, state)
    if role is Role.PRIMARY and (rewritten := _refreshed(me, cluster, state)) is not None:
        return Decision(role, f"{reason}; my address or the leader needs an update", rewritten)
    return Decision(role, reason)


def _first_setup(me: Me, peers: Sequence[Instance], zero_position: str, now: datetime) -> Decision:
    if not peers:
        return Decision(Role.UNKNOWN, "no peer is registered yet, not even this one")
    if not me.is_me(peers[0]):
        return Decision(Role.UNASSIGNED, "another peer registered first and sets the cluster up")
    if not me.singleton:
        raise Misconfigured("replicated clusters are not supported yet: SINGLETON must be true")
    state = ClusterState(
        generation=1,
        singleton=True,
        freeze=Freeze(frozen_at=now, reason=SINGLETON_REASON),
        init_wal=zero_position,
        primary=me.instance,
    )
    return Decision(Role.PRIMARY, "first peer of a new cluster of one", state)


def _role_in(me: Me, state: ClusterState) -> tuple[Role, str]:
    if me.is_me(state.primary):
        return Role.PRIMARY, f"primary of generation {state.generation}"
    if any(me.is_me(peer) for peer in state.deposed):
        return Role.DEPOSED, "was primary of an earlier generation"
    return Role.UNASSIGNED, "another peer is the only member of this singleton cluster"


def _refreshed(me: Me, cluster: Cluster, state: ClusterState) -> ClusterState | None:
    """The state with my present address, if it has an old one or the service's leader is not me.

    A container that starts again on the same volume is the same peer at another address. Only a registered instance
    can lead, so the leader is judged once I am among the peers.
    """
    assert state.primary is not None  # the caller found me there
    moved = state.primary.id != me.instance.id or state.primary.meta != me.instance.meta
    registered = any(peer.id == me.instance.id for peer in cluster.peers)
    leaderless = registered and (cluster.leader is None or cluster.leader.id != me.instance.id)
    return replace(state, primary=me.instance) if moved or leaderless else None
