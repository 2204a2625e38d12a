"""Taking in a new version of a formation: staleness, and what counts as a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flynn.scheduler.model import Formation


@dataclass(frozen=True, slots=True)
class Accepted:
    formation: Formation
    changed: bool  # counts, tags or a pending request: worth a reconcile


@dataclass(frozen=True, slots=True)
class Stale:
    """The stored one is newer."""


def accept(stored: Formation | None, given: Formation) -> Accepted | Stale:
    """Judge a formation from the controller, which has refused already what must not be asked for."""
    if stored is None:
        return Accepted(given, changed=True)
    if stored.updated_at and given.updated_at and stored.updated_at > given.updated_at:
        return Stale()
    same = counts(stored.wanted) == counts(given.wanted) and stored.tags == given.tags
    return Accepted(given, changed=not same or given.scale_request is not None)


def counts(wanted: Mapping[str, int]) -> dict[str, int]:
    """Without the types that are not wanted at all: absent and zero mean the same."""
    return {type: count for type, count in wanted.items() if type and count > 0}
