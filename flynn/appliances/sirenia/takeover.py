"""A new generation: who may declare it, and on what evidence. Pure. See spec/appliances section 4.4.

A peer that wants to declare one first *holds* its database, so that from then on nobody is told any more that a write
is safe on it. Only then its log position means something: whatever was ever acknowledged with its help is below. The
state it then writes by compare-and-set carries that position as `init_wal`, and whoever takes over next must have got
at least so far. That no acknowledged write is lost follows from three things:

1. In a generation, a write is acknowledged only when primary *and* sync have it on disk.
2. A sync takes over only with all that was acknowledged before its generation (position) in the same history (lineage).
3. A primary that replaces its sync, and a sync that replaces its primary, have stopped to acknowledge before, and do
   not begin again until the state is a newer one than that which they wanted to replace. Also when they were killed
   meanwhile: what they wrote may be on its way still (`may_be_replaced_by`).

So a takeover is safe even when the one who seemed gone is not: detection decides about speed only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flynn.appliances.sirenia.cluster_state import ClusterState, Lineage
from flynn.types.codec import replace
from flynn.types.instance import Instance

Compare = Callable[[str, str], int]


@dataclass(frozen=True, slots=True)
class Takeover:
    reason: str
    state: ClusterState  # to be declared; only its position is open yet
    minimum: str  # the position to have reached, empty = any


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


def may_be_replaced_by(is_me: Callable[[Instance | None], bool], state: ClusterState) -> bool:
    """Whether a peer, in a life that it does not remember, may have written a takeover in place of this very state."""
    return state.freeze is None and (is_me(state.primary) or is_me(state.sync))


def declare(takeover: Takeover, received: str, usable: str, compare: Compare) -> ClusterState | Refused:
    """The state to write, given how far the held database has come."""
    try:
        behind = bool(takeover.minimum) and compare(received, takeover.minimum) < 0
    except ValueError as error:
        return Refused(f"positions cannot be compared: {error}")
    if behind:
        return Refused(f"not caught up: {received} is before {takeover.minimum}")
    return replace(takeover.state, init_wal=usable)


def follows(lineage: Lineage | None, state: ClusterState, primary: str) -> bool:
    """Whether data of this lineage are a beginning of what the primary of `state` has, so that positions compare.

    Those of the generation itself are, and those of the one before if its primary was the same. Not more: were a peer
    to take over that has not followed the primary's last promotion, its own would begin a timeline of the same number.
    """
    if lineage is None:
        return False
    if lineage.generation == state.generation:
        return True
    return lineage.generation == state.generation - 1 and lineage.primary == primary
