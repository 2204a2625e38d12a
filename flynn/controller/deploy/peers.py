"""Replacing the peers of a database cluster, one role at a time, as a pure function of what is seen of it.

One new peer comes up and has caught up before one old peer goes: the asyncs first, then the sync (the primary takes
the next in the chain as its sync), the primary last (the sync takes over). So there are never fewer copies than
wanted, and of the pair that confirms writes one half stays whatever step is being done.

    O/O/[O] -> O/O/[O,N] -> O/O/[N] -> O/O/[N,N] -> O/N/[N] -> O/N/[N,N] -> N/N/[N]

Nothing is remembered: the step follows from who is in the chain, so a worker that takes over asks again, and going back
to the old release is the same with the releases swapped. spec/appliances section 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flynn.appliances.sirenia.cluster_state import ClusterState


@dataclass(frozen=True, slots=True)
class Member:
    """One peer in the chain."""

    id: str  # in the directory
    release: str
    present: bool = True  # the directory lists it
    lacks: str = ""  # what it lacks of being whole: a primary takes writes, a standby has what the one before it has


@dataclass(frozen=True, slots=True)
class Chain:
    """A database cluster: primary, sync, then the asyncs, each replicating from the one before."""

    members: tuple[Member, ...]
    outside: tuple[Member, ...] = ()  # listed in the directory, but in no role
    frozen: str = ""  # why nobody may be taken in or take over


@dataclass(frozen=True, slots=True)
class Start:
    """One more peer of the release that is to be."""


@dataclass(frozen=True, slots=True)
class Stop:
    """One peer of another release is not needed any more."""

    member: Member


@dataclass(frozen=True, slots=True)
class Wait:
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """All members are of the release that is to be, and whole."""


Step = Start | Stop | Wait | Done


class Unfit(Exception):
    """The cluster is not one whose peers can be replaced; `str()` is what the user reads."""


def check_fit(state: ClusterState | None) -> ClusterState:
    """Return the state of a cluster in which a replacement may begin.

    Raises:
        Unfit: there is none, or nobody may change it.
    """
    if state is None:
        raise Unfit("missing sirenia cluster state")
    if state.singleton:
        raise Unfit("sirenia cluster in singleton mode")
    if state.freeze is not None:
        raise Unfit(f"sirenia cluster is frozen: {state.freeze.reason}")
    return state


def next_step(chain: Chain, release: str, wanted: int, expected: int) -> Step:
    """Decide what brings the chain nearer to `wanted` peers of `release` and none of another.

    `expected` counts the peers of the release that were asked for, whether they have come up or not.
    """
    fresh = [member for member in chain.members if member.release == release]
    stale = [member for member in chain.members if member.release != release]
    if reason := _unsound(chain, fresh):
        useless = _useless(stale, chain) if len(chain.members) > wanted else None
        return Stop(useless) if useless is not None else Wait(reason)
    if expected > len(fresh):
        return Wait(_awaited(chain, release))
    if stale and (len(chain.members) > wanted or expected >= wanted):
        going = _next_to_go(stale, chain)
        return Stop(going) if going.present else Wait(f"{_role(chain, going)} is gone, which the primary has to notice")
    if expected < wanted:
        return Start()
    return Done()


def _unsound(chain: Chain, fresh: Sequence[Member]) -> str:
    """Return why nothing may be changed now: the pair that confirms writes and all new peers have to be whole."""
    if chain.frozen:
        return f"the cluster is frozen: {chain.frozen}"
    for member in (*chain.members[:2], *fresh):
        if not member.present:
            return f"{_role(chain, member)} is not there"
        if member.lacks:
            return f"{_role(chain, member)}: {member.lacks}"
    return ""


def _useless(stale: Sequence[Member], chain: Chain) -> Member | None:
    """An async that is to go anyway, and may be what the ones behind it wait for."""
    if any(not member.present or member.lacks for member in chain.members[:2]) or chain.frozen:
        return None
    asyncs = [member for member in chain.members[2:] if member in stale]
    return next((member for member in asyncs if member.present and member.lacks), None)


def _next_to_go(stale: Sequence[Member], chain: Chain) -> Member:
    """Asyncs in their order, those of no use before the others, then the sync, the primary last."""
    asyncs = [member for member in stale if member in chain.members[2:]]
    # One that is gone already leaves the chain by itself.
    there = [member for member in asyncs if member.present] or asyncs
    return min(there, key=lambda member: not member.lacks) if there else stale[-1]


def _awaited(chain: Chain, release: str) -> str:
    waiting = [member for member in chain.outside if member.release == release]
    if waiting:
        return f"a new peer has not been taken in: {waiting[0].lacks or 'it has no role yet'}"
    return "a new peer has not come up"


def _role(chain: Chain, member: Member) -> str:
    place = chain.members.index(member)
    return ("the primary", "the sync")[place] if place < 2 else f"async {place - 2}"


def is_restored(chain: Chain, release: str, wanted: int, expected: int) -> bool:
    """Whether nothing is left to be taken back: only peers of the release have a role, and all of them are wanted."""
    return expected >= wanted and all(member.release == release for member in chain.members)
