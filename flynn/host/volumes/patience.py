"""File operations on file systems that may hang: each in a thread of its own, given up after a time.

A thread that waits for a file system without a server cannot be ended. In the event loop's pool a handful of them would
stop the whole daemon; here they are counted, and when too many are stuck nothing more is tried.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from flynn.host.volumes.provider import Unavailable

T = TypeVar("T")

SECONDS = 20.0
STUCK_LIMIT = 8


class PatientThreads:
    """Runs blocking functions for one storage. `stuck` is how many of them have been given up and not come back."""

    def __init__(self) -> None:
        self.stuck = 0

    async def run(self, function: Callable[..., T], *arguments: Any, seconds: float = SECONDS) -> T:
        """Return what the function returns or raises.

        Raises:
            Unavailable: it took longer than `seconds`, or too many others are stuck already.
        """
        if self.stuck >= STUCK_LIMIT:
            raise Unavailable(f"the file system hangs: {self.stuck} operations have not come back")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        thread = threading.Thread(target=_work, args=(loop, done, function, arguments), daemon=True, name="volumes")
        thread.start()
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(done)
        except TimeoutError as error:
            if done.done():
                raise  # the function's own
            self.stuck += 1
            done.add_done_callback(self._came_back)
            raise Unavailable(f"the file system did not answer in {seconds:.0f} s") from error

    def _came_back(self, done: asyncio.Future[Any]) -> None:
        self.stuck -= 1
        if not done.cancelled():
            done.exception()  # nobody waits for it any more


def _work(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        result, failure = function(*arguments), None
    except Exception as error:  # The edge: it belongs to the caller, in another thread.
        result, failure = None, error

    def tell() -> None:
        if done.done():
            return
        if failure is None:
            done.set_result(result)
        else:
            done.set_exception(failure)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:
        pass  # the daemon has left meanwhile
