"""Three real peers: replication, takeover, former primaries that come back, and the loss of everything at once."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flynn.appliances.sirenia.cluster_state import Role

from .cluster import Cluster, Node, Writer, cluster, until
from .conftest import BIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "postgres").exists(), reason="PostgreSQL 15 is not installed"),
]


async def rows(one: Cluster, node: Node) -> set[int]:
    async with await one.connect(node) as connection:
        return {row[0] for row in await (await connection.execute("SELECT n FROM written")).fetchall()}


async def insert(one: Cluster, number: int) -> None:
    async with await one.connect(await one.primary()) as connection:
        await connection.execute("CREATE TABLE IF NOT EXISTS written (n int PRIMARY KEY)")
        await connection.execute("INSERT INTO written VALUES (%s)", [number])


async def test_a_chain_over_tls_in_which_only_the_primary_takes_writes() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        state = await one.state()
        assert state is not None
        primary, sync, other = [one.at(peer) for peer in (state.primary, state.sync, (state.asyncs or [None])[0])]
        assert await rows(one, sync) == {1}  # before the insert was acknowledged
        await until(lambda: _has(one, other, {1}), 10)
        for node in (sync, other):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                async with await one.connect(node) as connection:
                    await connection.execute("DELETE FROM written")
            assert not (await one.status(node)).database.read_write
        async with await one.connect(primary) as connection:
            shown = await (await connection.execute("SHOW synchronous_standby_names")).fetchone()
            assert (await one.status(sync)).peer.id in shown[0]
            secured = await (
                await connection.execute(
                    "SELECT application_name, sync_state, ssl FROM pg_stat_replication JOIN pg_stat_ssl USING (pid)"
                )
            ).fetchall()
        assert secured == [((await one.status(sync)).peer.id, "sync", True)]  # the async hangs on the sync
        leader = await one.registry.leader("postgres")
        assert leader is not None
        assert leader.addr == primary.address
        status = await one.status(primary)
        assert status.database.synced_downstream is not None
        assert status.database.synced_downstream.id == state.sync.id  # type: ignore[union-attr]


async def _has(one: Cluster, node: Node, wanted: set[int]) -> bool:
    return await rows(one, node) >= wanted


@pytest.mark.parametrize("what", ["daemon", "sync", "silent"])
async def test_a_lost_half_of_the_pair_is_replaced_within_seconds_and_taken_back_later(what: str) -> None:
    async with cluster() as one, asyncio.TaskGroup() as group:
        await until(one.whole)
        writer = Writer(one)
        task = group.create_task(writer.run())
        await asyncio.sleep(1)
        before_it = await one.state()
        node = await (one.sync() if what == "sync" else one.primary())
        assert node.process is not None
        if what == "silent":  # nothing answers and nothing is closed, as when a machine stops
            stopped = [node.process.pid, *_tree(node.server_pid)]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        else:
            await node.kill()
        writer.gap, before = 0.0, len(writer.acknowledged)
        if what != "sync":
            # Silence is only believed after a few seconds; a client that hangs takes longer to see it than we do.
            assert await until(lambda: _writable(one, node), 20) < (10 if what == "silent" else 5)
        await until(lambda: _more(writer, before + 50), 30)
        if what == "silent":
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        else:
            await node.start()
        await until(one.whole, 60)
        assert await writer.lost() == set()
        state = await one.state()
        assert state is not None
        assert before_it is not None
        assert state.generation > before_it.generation
        assert state.deposed == []
        task.cancel()


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children)]


async def _more(writer: Writer, count: int) -> bool:
    return len(writer.acknowledged) >= count


async def test_all_three_come_back_after_a_power_cut_by_themselves() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 7)
        for node in one.nodes:
            os.kill(node.server_pid, signal.SIGKILL)
            await node.kill()
        for node in reversed(one.nodes):
            await node.start()
        await until(one.whole, 60)
        assert await rows(one, await one.primary()) == {7}
        await insert(one, 8)


async def test_after_a_power_cut_two_of_three_are_enough() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 7)
        lost = await one.primary()
        for node in one.nodes:
            os.kill(node.server_pid, signal.SIGKILL)
            await node.kill()
        for node in one.nodes:
            if node is not lost:
                await node.start()
        await until(lambda: _writable(one, lost), 60)
        assert await rows(one, await one.primary()) == {7}
        await lost.start()
        await until(one.whole, 60)


async def _writable(one: Cluster, but: Node) -> bool:
    try:
        primary = await one.primary()
        return primary is not but and (await one.status(primary)).database.read_write
    except Exception:  # whatever it is, it is not writable yet
        return False


async def test_writes_that_nobody_confirmed_are_taken_back_when_a_former_primary_returns() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        old = await one.primary()
        # Its own superuser may write without waiting for anybody, and does so while nobody receives.
        others = [node for node in one.nodes if node is not old]
        for node in others:
            for pid in _tree(node.server_pid):
                os.kill(pid, signal.SIGSTOP)
        async with await one.connect(old) as connection:
            await connection.execute("SET synchronous_commit = local")
            await connection.execute("INSERT INTO written SELECT generate_series(100, 5000)")
        os.kill(old.server_pid, signal.SIGKILL)
        await old.kill()
        for node in others:
            for pid in _tree(node.server_pid):
                os.kill(pid, signal.SIGCONT)
        await until(lambda: _writable(one, old), 60)
        await insert(one, 2)
        await old.start()
        await until(one.whole, 60)
        assert await rows(one, old) == {1, 2}
        assert "rewound" in one.log(old)


async def test_a_frozen_cluster_waits_and_goes_on_when_it_is_thawed() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        before = await one.state()
        primary, sync = await one.primary(), await one.sync()
        async with one.client(sync) as client:
            await client.freeze("maintenance")
            await primary.kill()
            await asyncio.sleep(3)
            state = await one.state()
            assert state is not None
            assert before is not None
            assert (state.generation, state.freeze is not None) == (before.generation, True)
            status = await one.status(sync)
            assert status.peer.role is Role.SYNC
            assert "maintenance" in status.peer.reason
            await client.unfreeze()
        await until(lambda: _writable(one, primary), 20)
        assert await rows(one, sync) == {1}


async def test_an_orderly_stop_of_the_primary_hands_over_at_once() -> None:
    async with cluster() as one:
        await until(one.whole)
        old = await one.primary()
        assert await old.terminate() == 0
        assert await until(lambda: _writable(one, old), 20) < 5


async def test_a_cluster_of_one_grows_to_three() -> None:
    async with cluster(SINGLETON="true") as one:
        first = one.nodes[0]

        async def single() -> bool:
            return any([await _is_writable(one, node) for node in one.nodes])

        await until(single)
        await insert(one, 1)
        first = await one.primary()
        for node in one.nodes:
            await node.terminate()
            await node.start(SINGLETON="false")
        await until(lambda: _is_writable(one, first))
        async with one.client(first) as client:
            await client.unfreeze()
            await client.wait_read_write(timedelta(seconds=30))
        await until(one.whole, 60)
        assert await rows(one, await one.sync()) == {1}


async def _is_writable(one: Cluster, node: Node) -> Any:
    try:
        return (await one.status(node)).database.read_write
    except Exception:  # whatever it is, it is not writable yet
        return False
