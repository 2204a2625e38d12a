"""The book of jobs: order of events, what is on the disk, and a disk that refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.host.jobs.book import JobBook
from flynn.host.jobs.lifecycle import Broken, Ended, Launched, StopAsked
from flynn.host.state import StateStore
from flynn.types.codec import replace
from flynn.types.errors import Conflict, NotFound, ServiceUnavailable
from flynn.types.host import ContainerConfig, HostJob, JobEventKind, JobStatus, Mountspec

JOB = HostJob(id="h-1", mountspecs=[Mountspec(type="squashfs", id="l")])
KINDS = JobEventKind


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = StateStore(tmp_path / "host.db")
    yield store
    store.close()


@pytest.fixture
def book(store: StateStore) -> JobBook:
    return JobBook(store, SystemClock(), "h")


async def test_events_come_in_the_order_of_the_changes_whoever_waits(book: JobBook) -> None:
    async with book.events.subscribe() as events:
        jobs = [replace(JOB, id=f"h-{number}") for number in range(20)]
        await asyncio.gather(*(book.add(job) for job in jobs))
        for job in jobs:
            book.note(job.id, Launched())
        for job in jobs:
            book.note(job.id, Ended(0))
        await asyncio.gather(*(book.cleaned(job.id) for job in jobs))
        numbered = [await anext(events) for _ in range(80)]
    seen = [one.event for one in numbered]
    assert [one.number for one in numbered] == list(range(numbered[0].number, numbered[0].number + 80))
    for job in jobs:
        assert [e.event for e in seen if e.job_id == job.id] == [KINDS.CREATE, KINDS.START, KINDS.STOP, KINDS.CLEANUP]
    snapshot = next(event.job for event in seen if event.event is KINDS.START)
    assert snapshot is not None
    assert snapshot.status is JobStatus.RUNNING


async def test_what_was_acknowledged_is_there_for_the_next_daemon(book: JobBook, store: StateStore) -> None:
    await book.add(JOB)
    with pytest.raises(Conflict):
        await book.add(JOB)
    await book.apply("h-1", Launched())
    again = JobBook(store, SystemClock(), "h")
    (kept,) = again.restore()
    assert (kept.job.status, kept.cleaned) == (JobStatus.RUNNING, False)
    await book.apply("h-1", Ended(0))
    assert JobBook(store, SystemClock(), "h").restore()[0].cleaned is False, "half cleaned"
    await book.cleaned("h-1")
    later = JobBook(store, SystemClock(), "h")
    assert later.restore() == []
    assert later["h-1"].status is JobStatus.DONE


async def test_a_successor_is_known_as_soon_as_its_predecessor_has_ended(book: JobBook, store: StateStore) -> None:
    async with book.events.subscribe() as events:
        await book.add(replace(JOB, resurrect=True))
        await book.succeed("h-1", Broken("lost"), replace(JOB, id="h-2", resurrect=True))
        assert [(await anext(events)).event.event for _ in range(3)] == [KINDS.CREATE, KINDS.ERROR, KINDS.CREATE]
    assert {kept.job.job.id for kept in JobBook(store, SystemClock(), "h").restore()} == {"h-1", "h-2"}


async def test_retired_jobs_still_answer(book: JobBook) -> None:
    for number in range(27):
        job = replace(JOB, id=f"h-{number}", config=ContainerConfig(env={"FLYNN_APP_ID": "a"}))
        await book.add(job)
        await book.apply(job.id, Ended(0))
        await book.cleaned(job.id)
    assert len(book.jobs) == 25
    assert book.find("h-0").job.id == "h-0"
    with pytest.raises(NotFound):
        book["h-0"]
    with pytest.raises(NotFound, match="host: unknown job"):
        book.find("h-99")


async def test_a_disk_that_refuses_stops_new_jobs_but_not_running_ones(book: JobBook, store: StateStore) -> None:
    await book.add(JOB)
    await store.commit(("PRAGMA query_only=ON", ()))
    with pytest.raises(ServiceUnavailable):
        await book.add(replace(JOB, id="h-2"))
    assert "h-2" not in book.jobs
    await book.apply("h-1", Launched())
    assert book["h-1"].status is JobStatus.RUNNING
    assert JobBook(store, SystemClock(), "h").restore()[0].job.status is JobStatus.STARTING
    store._connection.execute("PRAGMA query_only=OFF")
    await book.apply("h-1", StopAsked())
    assert JobBook(store, SystemClock(), "h").restore()[0].job.status is JobStatus.RUNNING
