"""Taking in formations: staleness, what counts as a change, and the release that is taken back because it fails."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from flynn.scheduler.desk import Desk
from flynn.scheduler.events import FormationsListed
from flynn.scheduler.model import Formation, FormationKey, Job
from flynn.types.app import Strategy

log = logging.getLogger(__name__)

REPLACED_IN_PLACE = frozenset((Strategy.DISCOVERD_META, Strategy.SIRENIA))


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


class FormationBook:
    """The formations as they are followed: the latest version of each, but for those that were taken back."""

    def __init__(self, desk: Desk) -> None:
        self.changed = False  # since `changed` was last set to False: other services may have to be watched
        self._desk = desk
        self._world = desk.world
        self._received_at: dict[FormationKey, datetime] = {}
        self._lowered: dict[tuple[FormationKey, str], int] = {}  # what a type had before it was scaled to nothing
        self._overruled: dict[FormationKey, datetime | None] = {}  # versions of formations that are not followed

    def received(self, given: Formation, now: datetime) -> None:
        key = given.key
        self._received_at[key] = now
        if key in self._overruled:
            if given.updated_at == self._overruled[key]:
                return
            del self._overruled[key]
        stored = self._world.formations.get(key)
        match accept(stored, given):
            case Stale():
                return
            case Accepted(formation, changed):
                for type, count in (stored.wanted if stored is not None else {}).items():
                    if count and not formation.wanted.get(type):
                        self._lowered[key, type] = count
                self._world.formations[key] = formation
                if changed:
                    self._desk.dirty[key] = None
        self.changed = True

    def listed(self, event: FormationsListed, now: datetime) -> None:
        """Take in all that want jobs; any other that did wants none any more."""
        active = {formation.key for formation in event.formations}
        for formation in event.formations:
            self.received(formation, now)
        for key, formation in list(self._world.formations.items()):
            known = key in active or key in self._overruled
            if not known and formation.active and self._received_at[key] < event.asked_at:
                self.received(replace(formation, wanted={}, updated_at=formation.updated_at), now)

    def take_back(self, job: Job) -> None:
        """Let the release before run again, where the platform's base was replaced by something that does not start.

        Whoever decides about deployments may need the very thing that is missing now: no database, no rollback. The
        worker comes to the same verdict from the same failures as soon as it can; until it has spoken the formations
        as they are in the database are not followed.
        """
        new = self._world.formations.get(job.key)
        if (
            new is None
            or not new.app.critical
            or new.app.strategy not in REPLACED_IN_PLACE
            or not new.wanted.get(job.type)
        ):
            return
        for old in [formation for formation in self._world.formations.values() if formation.app.id == job.app]:
            count = self._lowered.pop((old.key, job.type), 0)
            if new.app.strategy == Strategy.SIRENIA and max(count, new.wanted[job.type]) > 1:
                continue  # the data of a cluster of several are with its present members
            if not count or old.key == new.key or old.wanted.get(job.type):
                continue
            log.error(
                "release does not start, the one before runs again",
                extra={"app": new.app.name, "type": job.type, "release": new.release.id, "before": old.release.id},
            )
            for formation, wanted in ((new, 0), (old, count)):
                self._overruled[formation.key] = formation.updated_at
                self._world.formations[formation.key] = replace(
                    formation, wanted={**formation.wanted, job.type: wanted}, scale_request=None
                )
                self._desk.dirty[formation.key] = None
            return

    def prune(self) -> None:
        """Forget what is known of formations that are gone."""
        known = self._world.formations
        self._received_at = {key: at for key, at in self._received_at.items() if key in known}
        self._lowered = {kind: count for kind, count in self._lowered.items() if kind[0] in known}
