"""Time as something that is handed in: the shell asks a Clock, the pure cores get `now` as a value."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Wall-clock time in UTC, for stamps that people and other machines read."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment, for measuring."""

    async def sleep(self, duration: timedelta) -> None: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, duration: timedelta) -> None:
        await asyncio.sleep(duration.total_seconds())
