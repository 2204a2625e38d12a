"""When a neighbour is taken for dead although the directory still lists it. Pure: times are monotonic seconds.

The directory forgets a dead peer after ten seconds. Two peers that replicate to each other know sooner: the stream
between them breaks. Then they ask each other's management API, and what comes back (or does not) says how long to wait.
To be wrong costs a needless takeover, never a write (see `takeover`).
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from enum import StrEnum


class Answer(StrEnum):
    WELL = "well"  # its database runs and answers, or is being made a copy
    STARTING = "starting"  # a standby whose server comes up
    DOWN = "down"  # the daemon answers, its database does not
    REFUSED = "refused"  # the machine answers: no such process
    SILENT = "silent"  # nothing answers


PATIENCE = {
    Answer.STARTING: 8.0,  # on a busy machine; the next standby could not be ready much sooner
    Answer.DOWN: 2.0,  # a server that was killed is usually back within one second
    Answer.REFUSED: 0.6,  # a daemon does not come back sooner than another peer takes over
    Answer.SILENT: 3.0,  # a busy machine or a lost packet or two
}
AWAITED = 15.0  # after a power cut, peers need a few seconds to be back; whoever is first should not depose the others


@dataclass(frozen=True, slots=True)
class Doubt:
    """About one neighbour: since when it has not been well, and what it answered last."""

    neighbour: str
    since: float
    answer: Answer

    def is_gone(self, now: float) -> bool:
        return now - self.since >= PATIENCE[self.answer]


def doubted(doubt: Doubt | None, neighbour: str, answer: Answer, now: float) -> Doubt | None:
    """The doubt after one more answer; None when there is none any more."""
    if answer is Answer.WELL:
        return None
    if doubt is None or doubt.neighbour != neighbour:
        return Doubt(neighbour, now, answer)
    return Doubt(neighbour, doubt.since, answer)


def still_awaited(members: Iterable[str], seen: Set[str], started: float, now: float) -> frozenset[str]:
    """The members that were never seen since this peer started, a moment ago."""
    return frozenset(members) - seen if now - started < AWAITED else frozenset()
