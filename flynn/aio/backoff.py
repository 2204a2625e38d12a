"""Waiting between tries: one policy as a value, one loop that follows it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays that grow from `first` by `factor` up to `limit`, each shortened at random by up to the `jitter` share."""

    first: timedelta = timedelta(milliseconds=100)
    factor: float = 2.0
    limit: timedelta = timedelta(seconds=5)
    jitter: float = 0.2

    def delays(self, rng: random.Random | None = None) -> Iterator[float]:
        """Seconds to wait before the second try, the third, and so on without end."""
        rng = rng or random.Random()
        delay, limit = self.first.total_seconds(), self.limit.total_seconds()
        while True:
            yield delay * (1 - self.jitter * rng.random())
            delay = min(delay * self.factor, limit)


async def attempts(policy: Backoff, within: timedelta | None = None) -> AsyncIterator[int]:
    """Count tries from 1, pausing in between; ends when the next pause would pass `within` (None = never)."""
    loop = asyncio.get_running_loop()
    deadline = None if within is None else loop.time() + within.total_seconds()
    for number, delay in enumerate(policy.delays(), start=1):
        yield number
        if deadline is not None and loop.time() + delay > deadline:
            return
        await asyncio.sleep(delay)


async def retrying(
    call: Callable[[], Awaitable[T]],
    *,
    on: type[Exception] | tuple[type[Exception], ...],
    policy: Backoff | None = None,
    within: timedelta | None = None,
) -> T:
    """Call until it succeeds. The last error is raised when `within` has passed; other errors rise at once."""
    last: Exception | None = None
    async for _ in attempts(policy or Backoff(), within):
        try:
            return await call()
        except on as error:
            last = error
    assert last is not None
    raise last
