"""Sending everything that is logged to one place: a reader of all apps' logs, merged in order, from a cursor on.

Lines go out in the order of their cursors over all apps, so that "everything up to here" is one cursor, also after a
broken connection. A sink that is slow or away loses nothing until the files are rotated away.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, Iterator

from flynn.host.logs.files import LogDirectory, LogReader
from flynn.host.logs.record import Cursor, Record

BATCH_RECORDS = 500


class Shipment:
    """All lines of a host after a cursor, and those to come. Close it when done."""

    def __init__(self, logs: LogDirectory, after: Cursor) -> None:
        self._logs, self._after = logs, after
        self._readers: dict[str, LogReader] = {}
        self._known = set(logs.apps())
        self._news = asyncio.Event()
        logs.listeners.add(self._news)

    async def batches(self) -> AsyncGenerator[list[Record], None]:
        """Yield what there is in batches of bounded size, then wait for more, for ever."""
        while True:
            self._news.clear()
            batch: list[Record] = []
            for record in heapq.merge(*self._available(), key=_cursor):
                batch.append(record)
                if len(batch) >= BATCH_RECORDS:
                    yield batch
                    batch = []
            if batch:
                yield batch
            await self._news.wait()

    def _available(self) -> list[Iterator[Record]]:
        for app_id in self._known | self._logs.open_apps():
            if app_id not in self._readers:
                self._readers[app_id] = self._logs.app(app_id).reader(history=True)
        return [reader.available(after=self._after) for reader in self._readers.values() if reader.changed.is_set()]

    def close(self) -> None:
        self._logs.listeners.discard(self._news)
        for reader in self._readers.values():
            reader.close()


def _cursor(record: Record) -> Cursor:
    return record.cursor
