"""What goes wrong with one peer's server or data while its daemon lives; and orders in which all come back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from flynn.appliances.sirenia.database import STARTING

from .cluster import Cluster, Node, Writer, cluster, until
from .conftest import BIN
from .test_cluster import _more, _tree, _writable, insert, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "postgres").exists(), reason="PostgreSQL 15 is not installed"),
]


@asynccontextmanager
async def writing(one: Cluster) -> AsyncIterator[Writer]:
    """A writer; in the end nothing that it was told to be safe is missing."""
    async with asyncio.TaskGroup() as group:
        writer = Writer(one)
        task = group.create_task(writer.run())
        await until(lambda: _more(writer, 20), 30)
        yield writer
        await flows(writer, 30)
        assert await writer.lost() == set()
        task.cancel()


async def flows(writer: Writer, within: float) -> None:
    wanted = len(writer.acknowledged) + 20
    await until(lambda: _more(writer, wanted), within)


async def third(one: Cluster) -> Node:
    state = await one.state()
    assert state is not None and state.asyncs
    return one.at(state.asyncs[0])


@pytest.mark.parametrize("which", ["primary", "sync"])
async def test_a_server_that_hangs_is_replaced_although_its_daemon_answers(which: str) -> None:
    async with cluster() as one:
        await until(one.whole)
        async with writing(one) as writer:
            node = await (one.primary() if which == "primary" else one.sync())
            hung = _tree(node.server_pid)
            for pid in hung:
                os.kill(pid, signal.SIGSTOP)
            before = await one.state()
            assert before is not None
            seconds = await until(lambda: _generation(one, before.generation + 1), 30)
            await flows(writer, 20)
            print(f"\n{which} hangs: next generation after {seconds:.1f} s")
            for pid in hung:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            await until(one.whole, 90)
        assert seconds < 15


async def _generation(one: Cluster, wanted: int) -> bool:
    state = await one.state()
    return state is not None and state.generation >= wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small volume")
async def test_a_primary_without_room_for_its_log_makes_way_and_comes_back_when_there_is_room() -> None:
    async with cluster(volume_megabytes=400) as one:
        await until(one.whole)
        async with writing(one) as writer:
            full = await one.primary()
            filler = full.directory / "data" / "filler"
            _fill(filler)
            try:
                began = asyncio.get_running_loop().time()
                while not await _writable(one, full):
                    assert asyncio.get_running_loop().time() - began < 60
                    with suppress(psycopg.Error, OSError):
                        async with await one.connect(full) as connection:
                            await connection.execute("SET statement_timeout = '2s'")
                            await connection.execute("SELECT pg_switch_wal()")
                    await asyncio.sleep(0.1)
                await flows(writer, 20)
                assert "No space left" in one.log(full)
            finally:
                filler.unlink()
            await until(one.whole, 90)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


async def test_an_async_that_found_nobody_to_rejoin_tries_again_although_nothing_else_happens() -> None:
    async with cluster() as one:
        await until(one.whole)
        node, above, primary = await third(one), await one.sync(), await one.primary()
        async with one.client(primary) as client:
            await client.freeze("so that nobody is told anything")
        rules = above.directory / "data" / "db" / "pg_hba.conf"
        admitted = rules.read_text()
        rules.write_text("hostssl replication all all reject\n" + admitted)
        os.kill(above.server_pid, signal.SIGHUP)
        hung = _tree(primary.server_pid)
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        try:
            await node.kill()
            await node.start()
            await until(lambda: _says(one, node, "cannot follow the upstream"), 90)
        finally:
            rules.write_text(admitted)
            os.kill(above.server_pid, signal.SIGHUP)
            for pid in hung:
                os.kill(pid, signal.SIGCONT)
        await until(one.whole, 60)


async def test_a_standby_that_waits_for_log_from_a_dead_upstream_follows_the_next_one_at_once() -> None:
    async with cluster() as one:
        await until(one.whole)
        async with writing(one) as writer:
            node, sync = await third(one), await one.sync()
            await node.terminate()
            for segment in (node.directory / "data" / "db" / "pg_wal").glob("?" * 24):
                segment.unlink()
            # What it needs to start has to come from its upstream, which does not send.
            rules = sync.directory / "data" / "db" / "pg_hba.conf"
            rules.write_text("hostssl replication all all reject\n" + rules.read_text())
            os.kill(sync.server_pid, signal.SIGHUP)
            await node.start()
            await until(lambda: _says(one, node, "rejects replication"), 30)
            await until(lambda: _starting(one, node), 10)
            writer.gap = 0.0
            await sync.kill()
            seconds = await until(lambda: _is_sync(one, node), 30)
            await flows(writer, 10)
            print(f"\nthe new sync confirms after {seconds:.1f} s, longest pause {writer.gap:.1f} s")
            await sync.start()
            await until(one.whole, 60)


async def _starting(one: Cluster, node: Node) -> bool:
    return (await one.status(node)).database.detail == STARTING


async def _is_sync(one: Cluster, node: Node) -> bool:
    """Whether the primary takes writes that this one confirms."""
    database = (await one.status(await one.primary())).database
    return database.read_write and one.at(database.synced_downstream) is node


async def _says(one: Cluster, node: Node, words: str) -> bool:
    return words in one.log(node)


@pytest.mark.parametrize("what", ["nothing there", "control file cut", "catalog gone"])
async def test_an_async_with_broken_data_gets_a_new_copy(what: str) -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        node = await third(one)
        db = node.directory / "data" / "db"
        os.kill(node.server_pid, signal.SIGKILL)
        await node.kill()
        match what:
            case "nothing there":
                shutil.rmtree(db)
            case "control file cut":
                os.truncate(db / "global" / "pg_control", 100)
            case _:
                shutil.rmtree(db / "global")
        await insert(one, 2)
        await node.start()
        await until(one.whole, 60)
        assert await rows(one, node) == {1, 2}
        assert "copied" in one.log(node)


async def test_a_primary_whose_data_are_gone_is_succeeded_and_gets_a_copy() -> None:
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        node = await one.primary()
        os.kill(node.server_pid, signal.SIGKILL)
        await node.kill()
        shutil.rmtree(node.directory / "data" / "db")
        await node.start()
        await until(lambda: _writable(one, node), 30)
        await insert(one, 2)
        await until(one.whole, 60)
        assert await rows(one, node) == {1, 2}


async def _power_cut(*nodes: Node) -> None:
    for node in nodes:
        os.kill(node.server_pid, signal.SIGKILL)
        await node.kill()


async def test_the_primary_may_be_the_last_to_come_back_from_a_power_cut() -> None:
    """The others wait for a while; then the sync, which has all that was acknowledged, takes over."""
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 7)
        last = await one.primary()
        await _power_cut(*one.nodes)
        for node in one.nodes:
            if node is not last:
                await node.start()
        await until(lambda: _writable(one, last), 40)
        await insert(one, 8)
        await last.start()
        await until(one.whole, 60)
        assert await rows(one, last) == {7, 8}


async def test_who_has_missed_a_generation_does_not_begin_alone_however_early_it_is_back() -> None:
    """The newest data come last: until then nobody writes, and afterwards nothing is missing."""
    async with cluster() as one:
        await until(one.whole)
        await insert(one, 1)
        stale, first = await one.sync(), await one.state()
        assert first is not None
        await _power_cut(stale)
        await until(lambda: _generation(one, first.generation + 1), 30)
        await until(lambda: _takes(one, 2), 30)
        await until(lambda: _without_asyncs(one), 30)
        before = await one.state()
        assert before is not None
        primary, sync = await one.primary(), await one.sync()
        await _power_cut(primary, sync)
        await stale.start()
        await asyncio.sleep(5)  # alone for a while
        await sync.start()
        await asyncio.sleep(20)  # longer than anybody is awaited
        state = await one.state()
        assert state is not None and state.generation == before.generation
        assert not [node for node in (stale, sync) if (await one.status(node)).database.read_write]
        await primary.start()
        await until(one.whole, 60)
        for node in one.nodes:
            assert await rows(one, node) == {1, 2}


async def _without_asyncs(one: Cluster) -> bool:
    """Whether the primary has dropped who is gone."""
    state = await one.state()
    return state is not None and not state.asyncs


async def _takes(one: Cluster, number: int) -> bool:
    with suppress(psycopg.Error, OSError, TimeoutError):
        async with asyncio.timeout(5):
            await insert(one, number)
        return True
    return False
