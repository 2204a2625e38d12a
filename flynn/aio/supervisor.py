"""The owner of a daemon's endless tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

Endless = Coroutine[Any, Any, None]
Spawn = Callable[[str, Endless], None]


@asynccontextmanager
async def supervisor() -> AsyncIterator[Spawn]:
    """Own the endless tasks of a daemon: leaving the block cancels and awaits them, one failing ends the block."""

    async def never_returns(name: str, body: Endless) -> None:
        await body
        raise RuntimeError(f"task {name!r} ended by itself")

    tasks: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:
        try:
            yield lambda name, body: tasks.append(group.create_task(never_returns(name, body), name=name))
        finally:
            for task in tasks:
                task.cancel()


class TaskSet:
    """The owner of short tasks that come and go: leaving the block cancels and awaits those still running.

    A task that fails ends the block, as in a TaskGroup: its body handles what it can, anything else is a bug.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> TaskSet:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*exc)

    def start(self, name: str, body: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._group.create_task(body, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __len__(self) -> int:
        return len(self._tasks)
