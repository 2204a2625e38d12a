"""The steps of a deployment, as a pure function of where it stands.

Every strategy answers one question: given the counts of the old and the new release, what is to be scaled next?
A worker that is killed in the middle therefore needs no memory of its own: it reads both formations and asks again.
spec/controller-worker.md sections 3.2 and 3.3. What is not here: talking to the scheduler, waiting, events, rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from flynn.types.app import Strategy

Counts = Mapping[str, int]

SIRENIA_PROCESS = "SIRENIA_PROCESS"  # environment variable that names the database's process type
TOLERATED_FAILED_STARTS = 5  # per scale step of the new release; the next one ends the deployment


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a deployment stands."""

    wanted: Counts  # counts of the old release when the deployment was made: what the new one is to reach
    types: Collection[str]  # process types of the new release
    old: Counts
    new: Counts
    batch: int = 1

    def target(self, process_type: str) -> int:
        """Return how many the new release is to have in the end: none of a type it no longer knows."""
        return self.wanted.get(process_type, 0) if process_type in self.types else 0

    def all_types(self) -> list[str]:
        """Return the types to visit, in order; a type the old release was given during the deployment goes as well."""
        return sorted({*self.wanted, *(t for t, count in self.old.items() if count)})

    def without(self, process_type: str) -> Progress:
        """Return the same as if there were no jobs of that type."""

        def others(counts: Counts) -> Counts:
            return {name: count for name, count in counts.items() if name != process_type}

        return replace(self, wanted=others(self.wanted), old=others(self.old), new=others(self.new))

    def surplus(self, process_type: str) -> int:
        """Return how many more run, of both releases, than are wanted."""
        return self.old_count(process_type) + self.new_count(process_type) - self.wanted.get(process_type, 0)

    def new_count(self, process_type: str) -> int:
        """Return the present count of the new release."""
        return self.new.get(process_type, 0)

    def old_count(self, process_type: str) -> int:
        """Return the present count of the old release."""
        return self.old.get(process_type, 0)


@dataclass(frozen=True, slots=True)
class ScaleNew:
    """Scale the new release and wait until its jobs are up."""

    processes: Counts


@dataclass(frozen=True, slots=True)
class ScaleOld:
    """Scale the old release down. Without `wait` the deployment is done as soon as this is asked for."""

    processes: Counts
    wait: bool = True


@dataclass(frozen=True, slots=True)
class Swap:
    """Lower the old release and raise the new one in one decision, and wait until the new jobs are up.

    For what carries the platform: once the database is down nobody could ask for its successor any more. The scheduler
    starts a new job when the old one has gone.
    """

    old: Counts
    new: Counts


Step = ScaleNew | ScaleOld | Swap
NextStep = Callable[[Progress], Step | None]


def all_at_once(progress: Progress) -> Step | None:
    """Bring the whole new release up, then send the old one away without waiting for it to be gone."""
    missing = {t: progress.target(t) for t in progress.wanted if progress.new_count(t) < progress.target(t)}
    if missing:
        return ScaleNew(missing)
    if any(progress.old.values()):
        return ScaleOld({t: 0 for t, count in progress.old.items() if count}, wait=False)
    return None


def up_then_down(progress: Progress) -> Step | None:
    """Per type, in alphabetical order: a batch of the new release up, then as many of the old one down.

    Never fewer than the wanted number run, never more than one batch above it; a resumed deployment that finds too
    many running lowers the old release first.
    """
    for name in progress.all_types():
        old, new, target = progress.old_count(name), progress.new_count(name), progress.target(name)
        surplus = progress.surplus(name)
        if old and (surplus > 0 or new >= target):
            gone = min(old, progress.batch if new >= target else min(surplus, progress.batch))
            return ScaleOld({name: old - gone})
        if new < target:
            return ScaleNew({name: min(target, new + progress.batch)})
    return None


def down_then_up(progress: Progress) -> Step | None:
    """Per type, in alphabetical order: one old job down, then one new job up; for those who cannot run side by side."""
    for name in progress.all_types():
        old, new, target = progress.old_count(name), progress.new_count(name), progress.target(name)
        if old and (progress.surplus(name) >= 0 or new >= target):
            return ScaleOld({name: old - 1})
        if new < target:
            return ScaleNew({name: new + 1})
    return None


def _swapped(progress: Progress, name: str) -> Step | None:
    old, new, target = progress.old_count(name), progress.new_count(name), progress.target(name)
    if not old and new >= target:
        return None
    if new >= target:
        return ScaleOld({name: 0})
    return Swap(old={name: 0} if old else {}, new={name: target})


def database_alone(database: str) -> NextStep:
    """Return the rule for a database cluster of one: its process is swapped, the other types go one by one."""

    def steps(progress: Progress) -> Step | None:
        return _swapped(progress, database) or up_then_down(progress.without(database))

    return steps


SUPPORTED: Mapping[Strategy, NextStep] = {
    Strategy.ALL_AT_ONCE: all_at_once,
    Strategy.ONE_BY_ONE: up_then_down,
    Strategy.ONE_DOWN_ONE_UP: down_then_up,
    Strategy.IN_BATCHES: up_then_down,
    Strategy.DISCOVERD_META: up_then_down,  # both on each host; when the new one takes over is its own business
}
IN_PLACE = frozenset((Strategy.ONE_DOWN_ONE_UP, Strategy.SIRENIA))
"""Strategies of apps whose old and new jobs must never run side by side, also not when a deployment is taken back."""


class UnsupportedStrategy(Exception):
    """No steps are known for the strategy; `str()` is what the user reads in the deployment event."""


def strategy_steps(name: str) -> NextStep:
    """Return the rule for the strategy of that name.

    Raises:
        UnsupportedStrategy: unknown, or one that needs the cooperation of the processes themselves.
    """
    try:
        return SUPPORTED[Strategy(name)]
    except ValueError:
        raise UnsupportedStrategy(f'deployment: unknown strategy "{name}"') from None
    except KeyError:
        raise UnsupportedStrategy(f'deployment: strategy "{name}" is not supported by this controller yet') from None


def database_process(old_env: Mapping[str, str], new_env: Mapping[str, str]) -> str:
    """Return which process type is the database of an app with strategy `sirenia`."""
    process = old_env.get(SIRENIA_PROCESS) or new_env.get(SIRENIA_PROCESS)
    if not process:
        raise UnsupportedStrategy("unable to determine sirenia process type")
    return process


def sirenia(progress: Progress, database: str) -> NextStep:
    """Return the rule for what is a matter of counts: a database alone, and the other types.

    The peers of a cluster of several are replaced before, by `peers`; what is left of the old ones is to be stopped.

    Raises:
        UnsupportedStrategy: there is no database in the new release.
    """
    if database not in progress.types:
        raise UnsupportedStrategy("sirenia process type not present in new release")
    if progress.wanted.get(database, 0) <= 1:
        return database_alone(database)

    def steps(progress: Progress) -> Step | None:
        if progress.old_count(database):
            return ScaleOld({database: 0})
        return up_then_down(progress.without(database))

    return steps


def batch_size(strategy: str, requested: int | None, hosts: int) -> int:
    """Return how many jobs move at once; batches default to one job per host."""
    if strategy != Strategy.IN_BATCHES:
        return 1
    return max(1, requested if requested is not None and requested > 0 else hosts)


def failed_start_message(process_type: str, host_error: str | None) -> str:
    """Return the words with which a deployment gives up on jobs that do not come up."""
    return f"{process_type} job failed to start: {host_error or 'got down job event'}"
