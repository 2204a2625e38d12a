"""How the replacement of an ended job begins: at once, after a while, or when its host has brought it back itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta

from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.model import Formation, FormationKey, Job, JobState
from flynn.types.app import Strategy

QUICK_RESTARTS = 5  # so many in a row come without delay
SLOW_RESTARTS = 15  # and from here on the delay is the longest
RESTART_DELAY = timedelta(seconds=10)
LONG_RESTART_DELAY = timedelta(seconds=30)
STABLE_AFTER = timedelta(minutes=5)  # a job that lived so long begins anew with its restart count

RESURRECTION = timedelta(seconds=3)  # for a host to show the successor of a job that it brings back by itself
FAILED_STARTS = 5  # in a row; with one more a release of the platform's base is taken back, as the controller does
ONE_AT_A_TIME = frozenset((Strategy.ONE_DOWN_ONE_UP,))

Kind = tuple[FormationKey, str]  # the jobs of one type of a formation


@dataclass(frozen=True, slots=True)
class Restart:
    """How the replacement of an ended job begins."""

    restarts: int
    delay: timedelta


def restart_of(job: Job, now: datetime) -> Restart:
    """The restart count and delay of the job that replaces `job`. How it ended makes no difference."""
    past = job.restarts
    if job.started_at is not None and (job.ended_at or now) - job.started_at > STABLE_AFTER:
        past = 0
    if past < QUICK_RESTARTS:
        return Restart(past + 1, timedelta(0))
    return Restart(past + 1, RESTART_DELAY if past < SLOW_RESTARTS else LONG_RESTART_DELAY)


class Restarts:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._ended: dict[Kind, list[Restart]] = defaultdict(list)
        self._resurrecting: dict[Kind, list[datetime]] = {}  # until when successors are waited for
        self._failed_starts: Counter[Kind] = Counter()  # in a row

    def ended(self, job: Job, before: JobState, now: datetime, *, resurrected: bool) -> bool:
        """Remember an end that nobody asked for. Returns whether its release does not seem to start at all."""
        kind = job.key, job.type
        self.replace(job, now)
        if resurrected:
            self._resurrecting.setdefault(kind, []).append(now + RESURRECTION)
            self._desk.at(now + RESURRECTION, Timer.SUCCESSOR)
        if before is JobState.RUNNING:
            return False
        # Counted here: a job that its host brings back begins with a count of its own.
        self._failed_starts[kind] += 1
        return self._failed_starts[kind] > FAILED_STARTS

    def replace(self, job: Job, now: datetime) -> None:
        """Have the next job of its type go on with its count."""
        self._ended[job.key, job.type].append(restart_of(job, now))

    def up(self, job: Job) -> None:
        self._failed_starts.pop((job.key, job.type), None)

    def successor(self, job: Job) -> None:
        """A job has turned up that nobody here made: the one that was waited for, perhaps."""
        if awaited := self._resurrecting.get((job.key, job.type)):
            awaited.pop(0)

    def awaited(self, key: FormationKey, type: str, now: datetime) -> int:
        """How many jobs their host is about to bring back."""
        return sum(1 for until in self._resurrecting.get((key, type), ()) if until > now)

    def pending(self, key: FormationKey, type: str) -> list[Restart]:
        """How the next jobs of a type begin, as far as they replace others."""
        return self._ended.get((key, type), [])

    def settled(self, formation: Formation) -> None:
        """What was not replaced now was not wanted any more."""
        for type in formation.release.processes:
            if (formation.key, type) not in self._resurrecting:
                self._ended.pop((formation.key, type), None)

    def give_up_successors(self, now: datetime) -> None:
        """What has not come back by now is replaced as any other."""
        self._desk.dirty.update(dict.fromkeys(key for key, _ in self._resurrecting))
        left = {kind: [moment for moment in until if moment > now] for kind, until in self._resurrecting.items()}
        self._resurrecting = {kind: until for kind, until in left.items() if until}

    def forget(self) -> None:
        self._ended.clear()
        self._resurrecting.clear()

    def prune(self) -> None:
        """Forget counts of formations that are gone."""
        for kind in [kind for kind in self._failed_starts if kind[0] not in self._desk.world.formations]:
            del self._failed_starts[kind]

    def waits_for(self, formation: Formation, type: str, now: datetime) -> str:
        """Return what has to be gone before a job of this type may start; empty if nothing is in its way.

        A job on its way out, or one that its host is about to bring back, may hold data that are to be taken over: to
        start before would be to start with an empty volume. Or the app's strategy says that its jobs cannot run side
        by side.
        """
        alone = formation.app.strategy in ONE_AT_A_TIME
        takes_over = any(not request.delete_on_stop for request in formation.volume_requests(type))
        if not alone and not takes_over:
            return ""
        shared = alone or formation.app.keeps_volumes
        for job in self._desk.world.leaving(formation.app.id, type):
            if alone or (job.volumes and (shared or job.release == formation.release.id)):
                return f"waits for {job.cluster_id} to end"
        for (key, name), awaited in self._resurrecting.items():
            same = key.app == formation.app.id and name == type and (shared or key == formation.key)
            if same and any(until > now for until in awaited):
                return f"waits for the job of release {key.release} that its host brings back"
        return ""
