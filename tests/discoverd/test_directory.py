"""The shell around the directory's rules, with a Raft whose answers come when the test says so."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flynn.discoverd import store
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.raft.node import RaftConfig
from flynn.types.instance import Instance

INSTANCE = Instance(id="a", addr="192.0.2.1:80", proto="tcp", meta={})


class Hurried:
    """A clock whose sleeps take no time, for a limited number of them."""

    def __init__(self, sleeps: int) -> None:
        self.left, self._seconds, self.spent = sleeps, 0.0, asyncio.Event()

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._seconds, UTC)

    def monotonic(self) -> float:
        return self._seconds

    async def sleep(self, duration: timedelta) -> None:
        if self.left == 0:
            self.spent.set()
            await asyncio.Event().wait()
        self.left -= 1
        self._seconds += duration.total_seconds()
        await asyncio.sleep(0)


class SlowRaft:
    """Confirms a barrier when told to, as one that is forwarded to another leader; remembers what was submitted."""

    def __init__(self) -> None:
        self.is_leader, self.index = True, 1
        self.asked, self.confirm = asyncio.Event(), asyncio.Event()
        self.submitted: list[store.Command] = []

    async def barrier(self) -> None:
        self.asked.set()
        await self.confirm.wait()

    async def submit(self, command: bytes) -> store.Directory:
        self.submitted.append(store.decode_command(command))
        return store.Directory()


async def test_who_lost_the_lead_before_it_was_settled_expires_nobody(tmp_path: Path) -> None:
    clock, raft = Hurried(sleeps=100), SlowRaft()
    directory = LiveDirectory(
        RaftConfig(address="192.0.2.1:1110", peers=["192.0.2.1:1110"], directory=tmp_path, password="p"),
        clock,
        timedelta(seconds=10),
    )
    directory.raft = raft  # type: ignore[assignment]  # what of it is used here
    created = store.apply(store.Directory(), 1, store.CreateService("web", "oldest")).state
    directory.publish(store.apply(created, 2, store.PutInstance("web", INSTANCE)).state, ())

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        settling = group.create_task(directory.settle_leadership())
        directory.leadership_changed(True)
        await raft.asked.wait()
        raft.is_leader = False
        directory.leadership_changed(False)
        raft.confirm.set()
        expiring = group.create_task(directory.expire())
        await clock.spent.wait()
        # It leads again later. Until it knows that, it has no opinion about who is silent.
        assert directory._heartbeats.since is None
        settling.cancel()
        expiring.cancel()
    assert raft.submitted == []
