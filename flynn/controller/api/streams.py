"""Streams of state: everything changed since a time, a mark, then every change. spec/controller section 8.3."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from flynn.controller.hub import EventHub, told
from flynn.types.event import Event

T = TypeVar("T")


async def state_stream(
    hub: EventHub,
    stored: Callable[[], Awaitable[list[T]]],
    mark: T,
    live: Callable[[Event], Awaitable[T | None]],
    updated_at: Callable[[T], datetime | None],
) -> AsyncIterator[T]:
    """Yield what is stored, the mark that says "caught up", then what `live` makes of each event.

    What is older than the newest of the stored ones has been told already and is left out.
    """
    await hub.started()
    async with hub.subscribe() as events:
        newest: datetime | None = None
        for item in await stored():
            changed = updated_at(item)
            if changed is not None and (newest is None or changed > newest):
                newest = changed
            yield item
        yield mark
        async for event in told(events):
            item_or_none = await live(event)
            if item_or_none is None:
                continue
            changed = updated_at(item_or_none)
            if newest is None or changed is None or changed >= newest:
                yield item_or_none
