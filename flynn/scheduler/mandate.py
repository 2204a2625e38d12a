"""By which right this scheduler gives orders: hosts refuse the orders of one that has been replaced."""

from __future__ import annotations

from flynn.types.host import TERM_HEADER


class Mandate:
    """The term of our leadership: the directory's log index at which we were registered."""

    def __init__(self) -> None:
        self.term = 0  # 0: another one leads

    def headers(self) -> dict[str, str]:
        """What each request to a host carries."""
        return {TERM_HEADER: str(self.term)} if self.term else {}
