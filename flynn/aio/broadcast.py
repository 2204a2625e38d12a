"""One writer, many readers, each with a bounded queue of its own, so that a slow reader harms nobody but itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Overflowed(Exception):
    """The reader fell behind by more than its queue holds; what it missed is gone."""


class Closed(Exception):
    """The writer has ended the broadcast; `reason` may be shown to the reader's user."""


class Subscription(Generic[T]):
    """An endless async iterator over what is sent from the moment of subscribing."""

    def __init__(self, limit: int) -> None:
        self._queue: asyncio.Queue[T] = asyncio.Queue(limit)
        self._end: Exception | None = None
        self._ended = asyncio.Event()

    def _offer(self, item: T) -> bool:
        """Tell whether the reader still takes part."""
        if self._end is not None:
            return False
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self._finish(Overflowed(f"the reader is {self._queue.maxsize} items behind"))
            return False
        return True

    def _finish(self, reason: Exception) -> None:
        self._end = self._end or reason
        self._ended.set()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    def get_nowait(self) -> T | None:
        """The next item if one is waiting."""
        try:
            return self._queue.get_nowait()
        except asyncio.QueueEmpty:
            return None

    async def __anext__(self) -> T:
        # What was queued before the end is still delivered, then the reason is raised.
        if self._queue.empty() and self._end is None:
            getter = asyncio.ensure_future(self._queue.get())
            ender = asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait((getter, ender), return_when=asyncio.FIRST_COMPLETED)
            finally:
                ender.cancel()
                if not getter.done():
                    getter.cancel()
            if getter.done() and not getter.cancelled():
                return getter.result()
        if not self._queue.empty():
            return self._queue.get_nowait()
        assert self._end is not None
        raise self._end


class Broadcast(Generic[T]):
    def __init__(self) -> None:
        self._subscriptions: dict[Subscription[T], None] = {}  # in order, so that a simulation repeats itself

    @asynccontextmanager
    async def subscribe(self, limit: int = 1000) -> AsyncIterator[Subscription[T]]:
        """Everything sent while the block is open, at most `limit` items behind (then `Overflowed` is raised)."""
        subscription: Subscription[T] = Subscription(limit)
        self._subscriptions[subscription] = None
        try:
            yield subscription
        finally:
            self._subscriptions.pop(subscription, None)

    def send(self, item: T) -> None:
        for subscription in tuple(self._subscriptions):
            if not subscription._offer(item):
                self._subscriptions.pop(subscription, None)  # also one that nobody has begun to read

    def close(self, reason: Exception | None = None) -> None:
        """End every subscription, after what is queued, by raising `reason`."""
        for subscription in tuple(self._subscriptions):
            subscription._finish(reason or Closed("closed"))

    def __len__(self) -> int:
        return len(self._subscriptions)
