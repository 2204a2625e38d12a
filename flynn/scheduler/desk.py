"""What the parts of the engine share: the world, whether we lead, what is asked for, what is due, what to look at."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from flynn.scheduler import job_state
from flynn.scheduler.events import Action, PersistJob
from flynn.scheduler.model import FormationKey, Job, JobID, JobState
from flynn.scheduler.world import World


class Chance(Protocol):
    """What the rules need of `random.Random`."""

    def shuffle(self, items: list[Any], /) -> None: ...
    def randrange(self, stop: int, /) -> int: ...


class Timer(StrEnum):
    """What there is to do when a moment has come."""

    START = "start"  # a job's waiting time is over
    READY = "ready"  # a job has waited for routers long enough
    DEADLINE = "deadline"  # a job should be in service
    CHECK = "check"  # a host under suspicion is probed again
    SUCCESSOR = "successor"  # a host has had its time to bring a job back
    SWEEP = "sweep"
    BOOKS = "books"  # a new leader has waited for the controller's books long enough
    CLAIM = "claim"  # who was overruled, and leads by the directory all the same, tries again
    STEADY = "steady"  # a host may have been well for long enough to have jobs moved to it
    BALANCE = "balance"  # a job may be moved
    MOVE = "move"  # a move should be over


class Desk:
    """One per engine. Dicts stand where sets would do: decisions repeat exactly from a seed."""

    def __init__(self, random: Chance, new_id: Callable[[], str]) -> None:
        self.world = World()
        self.leader: bool | None = None  # None: not known yet
        self.random = random
        self.new_id = new_id
        self.dirty: dict[FormationKey, None] = {}  # formations to be reconciled
        self.to_place: dict[JobID, None] = {}  # pending jobs whose time has come
        self.blocked: dict[JobID, None] = {}
        self.starting: set[JobID] = set()  # start requests under way
        self.counts: dict[str, float] = defaultdict(float)  # what was done, by the names of `figures.COUNTED`
        self._told: dict[JobID, datetime] = {}  # when the controller was last told of a job, by us as the leader
        self._actions: list[Action] = []
        self._due: list[tuple[datetime, int, Timer, str]] = []
        self._timer_count = 0
        self._armed: set[Timer] = set()

    def ask(self, action: Action) -> None:
        """Have the shell do something, after this step."""
        self._actions.append(action)

    def take_actions(self, now: datetime) -> list[Action]:
        actions, self._actions = self._actions, []
        self._told.update((action.job.id, now) for action in actions if isinstance(action, PersistJob))
        return actions

    def told_since(self, id: JobID, moment: datetime) -> bool:
        """Whether a copy of the controller's books that was asked for at that moment may lack what it was told."""
        told_at = self._told.get(id)
        return told_at is not None and told_at >= moment

    def forget_told(self) -> None:
        """We do not lead any more: what was still to be told is not told by us."""
        self._told.clear()

    def prune(self) -> None:
        for id in [id for id in self._told if id not in self.world.jobs]:
            del self._told[id]

    def mark_all(self) -> None:
        """Have every formation looked at."""
        self.dirty.update(dict.fromkeys(self.world.formations))

    def unblock(self) -> None:
        """Something changed that jobs may have waited for: each blocked one is worth another try."""
        for id in list(self.blocked):
            self.blocked.pop(id, None)
            job = self.world.jobs.get(id)
            if job is not None and job.state is JobState.BLOCKED:
                unblocked, _ = job_state.advance(job, job_state.Unblocked())
                self.world.put_job(unblocked)
                self.to_place[id] = None

    def note(self, job: Job, reason: str) -> None:
        """Say what a pending job waits for."""
        if job.reason != reason:
            waiting = replace(job, reason=reason)
            self.world.put_job(waiting)
            if self.leader:
                self.ask(PersistJob(waiting))

    # Timers

    def at(self, due: datetime, kind: Timer, id: str = "") -> None:
        self._timer_count += 1
        heapq.heappush(self._due, (due, self._timer_count, kind, id))

    def arm(self, due: datetime, kind: Timer) -> None:
        """Like `at`, unless this kind is armed already."""
        if kind not in self._armed:
            self._armed.add(kind)
            self.at(due, kind)

    def next_due(self) -> datetime | None:
        return self._due[0][0] if self._due else None

    def due(self, now: datetime) -> Iterator[tuple[Timer, str]]:
        """Yield what is due, timers set meanwhile included."""
        while self._due and self._due[0][0] <= now:
            _, _, kind, id = heapq.heappop(self._due)
            self._armed.discard(kind)
            yield kind, id
