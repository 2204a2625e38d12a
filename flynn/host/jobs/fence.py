"""Which scheduler a host takes orders from: the latest leader it has heard of, as long as that one is heard.

A scheduler that was cut off from the directory may not know that another one leads. Leaders say by which right they
act, as the log index at which the directory registered them; of two leaders the later one has the greater index.
"""

from __future__ import annotations

from flynn.types.errors import PreconditionFailed

MEMORY_SECONDS = 75.0  # a leader lists all jobs every 30 s; after silence a lesser index is a directory that began anew


class Fence:
    def __init__(self) -> None:
        self._term = 0
        self._heard_at = 0.0

    def admit(self, term: int, now: float) -> None:
        """Take note of a leader that orders or asks. Raises `PreconditionFailed` for one that has been replaced."""
        if term < self._term and now < self._heard_at + MEMORY_SECONDS:
            raise PreconditionFailed(f"the scheduler of term {self._term} leads, not that of {term}")
        self._term, self._heard_at = term, now
