"""Pre-vote: whether an election could be won is asked before one is called. Raft dissertation, section 9.6.

A member that was cut off, or stood still, calls elections in vain, each with a higher term. Back among the others, its
term would depose a leader who is well, and writes would wait for another one. So it asks first, which changes nothing
anywhere: whoever hears a leader says nothing, and so does who has more log.

A leader with a lower term than ours does not get our ear and would never learn why; then an election is due at once.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field

SILENCE = 0.2  # seconds without a leader, of two messages, after which another one is agreed to
AGAIN = (0.1, 0.3)  # seconds until the others are asked once more; nobody is hurt by asking

Position = tuple[int, int]
"""Term and index of the last entry of a log: the greater one knows more."""


def agrees(*, leads: bool, silence: float, own: Position, other: Position) -> bool:
    """Whether a member would vote for another one, were there an election; `silence` is since it heard a leader."""
    return not leads and silence >= SILENCE and other >= own


@dataclass(slots=True)
class Canvass:
    """What one member knows about its prospects."""

    round: int = 0
    approved: bool = False  # an election may be called
    _agreed: set[Hashable] = field(default_factory=set)

    def begin(self) -> int:
        """Ask everybody again; the number goes with the question and comes back with the answers."""
        self.round += 1
        self._agreed.clear()
        return self.round

    def hear(self, other: Hashable, round: int, members: int) -> bool:
        """Somebody agrees; whether that makes a majority of so many members, ourselves included."""
        if round == self.round:
            self._agreed.add(other)
            self.approved = self.approved or len(self._agreed) + 1 > members / 2
        return self.approved

    def end(self) -> None:
        """There is a leader, or the election has been called: what was said before does not count any more."""
        self.round += 1
        self.approved = False
        self._agreed.clear()


def patience() -> float:
    return random.uniform(*AGAIN)
