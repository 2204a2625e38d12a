"""The witness outside: asks the app through every node's router, at a steady rate, and writes down what happened."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.cluster.lab.layout import Node

PER_SECOND = 4  # through each router
TIMEOUT_SECONDS = 3.0
IN_FLIGHT = 20  # of each router; at 4 a second with a limit of 3 s there are never more than 13


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it was sent (monotonic), through which node, how long it took, and why it failed, if it did."""

    at: float
    node: Node
    seconds: float
    problem: str = ""

    @property
    def answered_at(self) -> float:
        return self.at + self.seconds


class RequestWitness:
    """Asks from `start` to `stop`. Nodes in `dark` have no power or no link: nobody can be asked there."""

    def __init__(self, members: Sequence[Node], host: str) -> None:
        self.dark: frozenset[Node] = frozenset()
        self._members, self._host = tuple(members), host
        self._asked: list[Asked] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="requests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join(TIMEOUT_SECONDS + 5)

    def since(self, moment: float) -> list[Asked]:
        """All requests sent since then that have an outcome, in order of their end."""
        asked, found = self._asked, []
        for one in reversed(asked[: len(asked)]):
            if one.answered_at < moment:
                break
            if one.at >= moment:
                found.append(one)
        return found[::-1]

    def failing(self, last: int = 5) -> str:
        """Which node's router has not answered the `last` requests in a row just now; nothing if all have."""
        recent = self.since(time.monotonic() - last / PER_SECOND - TIMEOUT_SECONDS - 1)
        for member in self._members:
            if member in self.dark:
                continue
            outcomes = [one for one in recent if one.node == member][-last:]
            if len(outcomes) < last:
                return f"too few requests through {member.id} yet"
            if bad := next((one for one in outcomes if one.problem), None):
                return f"the app through {member.id}: {bad.problem}"
        return ""

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, member in enumerate(self._members):
                group.create_task(self._through(member, number / PER_SECOND / len(self._members)))

    async def _through(self, member: Node, offset: float) -> None:
        room = asyncio.Semaphore(IN_FLIGHT)
        await asyncio.sleep(offset)
        async with asyncio.TaskGroup() as group:
            while not self._ending.is_set():
                if member not in self.dark:
                    await room.acquire()
                    group.create_task(self._ask(member)).add_done_callback(lambda _: room.release())
                await asyncio.sleep(1 / PER_SECOND)

    async def _ask(self, member: Node) -> None:
        began, problem = time.monotonic(), ""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                problem = await self._get(member.ip)
        except TimeoutError:
            problem = f"no answer in {TIMEOUT_SECONDS:.0f} s"
        except OSError as error:
            problem = error.strerror or str(error)
        self._asked.append(Asked(began, member, time.monotonic() - began, problem))

    async def _get(self, ip: str) -> str:
        reader, writer = await asyncio.open_connection(ip, 80)
        try:
            writer.write(f"GET / HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n\r\n".encode())
            text = await reader.read(1 << 16)
            while more := await reader.read(1 << 16):
                text += more
        finally:
            writer.transport.abort()
        line = text.partition(b"\r\n")[0].decode("latin-1")
        return "" if " 200 " in f"{line} " else line or "the connection was closed"
