"""Taking in a new version of a formation: staleness, what counts as a change, and the guard of critical apps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flynn.scheduler.model import Formation


@dataclass(frozen=True, slots=True)
class Accepted:
    formation: Formation
    changed: bool  # counts, tags or a pending request: worth a reconcile


@dataclass(frozen=True, slots=True)
class Stale:
    """The stored one is newer."""


@dataclass(frozen=True, slots=True)
class RefusedChange:
    """The counts stay; everything else of the formation is taken over."""

    formation: Formation
    reason: str


def accept(stored: Formation | None, given: Formation, *, other_release_runs: bool) -> Accepted | Stale | RefusedChange:
    """Judge a formation from the controller. `other_release_runs`: another release of the app has running jobs."""
    if stored is None:
        return Accepted(given, changed=True)
    if stored.updated_at and given.updated_at and stored.updated_at > given.updated_at:
        return Stale()
    dropped = drops_to_zero(stored.wanted, given.wanted)
    if dropped and given.app.critical and not other_release_runs:
        request = given.scale_request
        kept = replace(given, wanted=stored.wanted, tags=stored.tags, refused=request.id if request else "")
        return RefusedChange(kept, f"refusing to scale down critical app {given.app.name}: {', '.join(dropped)}")
    same = counts(stored.wanted) == counts(given.wanted) and stored.tags == given.tags
    return Accepted(given, changed=not same or given.scale_request is not None)


def counts(wanted: Mapping[str, int]) -> dict[str, int]:
    """Without the types that are not wanted at all: absent and zero mean the same."""
    return {type: count for type, count in wanted.items() if type and count > 0}


def drops_to_zero(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """The types that had jobs and are to have none; a type that stays at zero is no news."""
    return sorted(type for type in counts(before) if after.get(type, 0) <= 0)
