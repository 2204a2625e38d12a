"""Tasks have owners, delays grow, slow readers harm only themselves."""

import asyncio
from datetime import timedelta
from random import Random

import pytest

from flynn.aio.backoff import Backoff, retrying
from flynn.aio.broadcast import Broadcast, Closed, Overflowed
from flynn.aio.supervisor import TaskSet, supervisor


async def test_leaving_a_supervisor_ends_its_tasks() -> None:
    ended = []

    async def endless(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async with supervisor() as spawn:
        spawn("a", endless("a"))
        spawn("b", endless("b"))
        await asyncio.sleep(0)
    assert sorted(ended) == ["a", "b"]


async def test_a_task_that_fails_ends_the_block() -> None:
    async def fails() -> None:
        raise OSError("disk")

    with pytest.raises(ExceptionGroup) as caught:
        async with supervisor() as spawn:
            spawn("bad", fails())
            await asyncio.Event().wait()
    assert caught.group_contains(OSError, match="disk")


async def test_an_endless_task_that_returns_is_a_failure() -> None:
    async def returns() -> None:
        return

    with pytest.raises(ExceptionGroup) as caught:
        async with supervisor() as spawn:
            spawn("short", returns())
            await asyncio.Event().wait()
    assert caught.group_contains(RuntimeError, match="'short' ended by itself")


async def test_short_tasks_come_and_go() -> None:
    async with TaskSet() as tasks:
        done = tasks.start("quick", asyncio.sleep(0, "value"))
        tasks.start("slow", asyncio.Event().wait())
        assert await done == "value"
        await asyncio.sleep(0)
        assert len(tasks) == 1


def test_delays_grow_to_their_limit() -> None:
    delays = Backoff(first=timedelta(seconds=1), factor=2, limit=timedelta(seconds=5), jitter=0).delays(Random(1))
    assert [next(delays) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_jitter_only_shortens() -> None:
    delays = Backoff(first=timedelta(seconds=1), factor=1, jitter=0.5).delays(Random(1))
    assert all(0.5 <= next(delays) <= 1 for _ in range(100))


async def test_trying_ends_with_the_first_success() -> None:
    outcomes = iter([OSError("1"), OSError("2"), "done"])

    async def call() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert await retrying(call, on=OSError, policy=Backoff(first=timedelta(0))) == "done"


async def test_trying_gives_up_with_the_last_error() -> None:
    async def call() -> None:
        raise OSError("still")

    with pytest.raises(OSError, match="still"):
        await retrying(
            call, on=OSError, policy=Backoff(first=timedelta(milliseconds=1)), within=timedelta(milliseconds=5)
        )


async def test_every_reader_gets_everything_from_its_subscription_on() -> None:
    broadcast: Broadcast[int] = Broadcast()
    broadcast.send(0)
    async with broadcast.subscribe() as one, broadcast.subscribe() as two:
        broadcast.send(1)
        broadcast.send(2)
        assert [await anext(one), await anext(one)] == [1, 2]
        assert await anext(two) == 1
    assert len(broadcast) == 0


async def test_a_slow_reader_is_told_and_others_are_not_held_up() -> None:
    broadcast: Broadcast[int] = Broadcast()
    async with broadcast.subscribe(2) as slow, broadcast.subscribe(10) as quick:
        for number in range(4):
            broadcast.send(number)
        assert [await anext(quick) for _ in range(4)] == [0, 1, 2, 3]
        assert [await anext(slow), await anext(slow)] == [0, 1]
        with pytest.raises(Overflowed):
            await anext(slow)


async def test_a_waiting_reader_is_woken_by_the_end() -> None:
    broadcast: Broadcast[int] = Broadcast()
    async with broadcast.subscribe() as reader:
        asyncio.get_running_loop().call_soon(broadcast.close)
        with pytest.raises(Closed):
            await anext(reader)


async def test_a_cancelled_wait_loses_nothing() -> None:
    broadcast: Broadcast[int] = Broadcast()
    async with broadcast.subscribe() as reader:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(reader)
        broadcast.send(7)
        assert await anext(reader) == 7
