"""What the controller is told: in order, again until it takes it, in bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from flynn.aio.supervisor import TaskSet
from flynn.scheduler import outbox
from flynn.scheduler.model import FormationKey, HostID, Job, JobID, JobState, Volume, VolumeID
from flynn.scheduler.outbox import Outbox
from flynn.types.errors import ServiceUnavailable, Unreachable, ValidationError
from flynn.types.formation import ScaleRequest
from flynn.types.job import Job as WireJob
from flynn.types.volume import Volume as WireVolume
from tests.scheduler.test_loop import MemoryController

KEY = FormationKey("a", "r")


class Controller(MemoryController):
    """Fails as often as it is told to, then takes what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()

    async def put_job(self, job: WireJob) -> WireJob:
        await self.open.wait()
        if self.failures:
            raise self.failures.pop()
        self.told.append(f"{job.uuid} {job.state}")
        return job

    async def put_volume(self, volume: WireVolume) -> WireVolume:
        await self.open.wait()
        self.told.append(f"{volume.id} {volume.state}")
        return volume


def job(id: str, state: JobState, *volumes: str) -> Job:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    ids = tuple(VolumeID(volume) for volume in volumes)
    return Job(JobID(id), KEY.app, KEY.release, "web", state, at, host=HostID("h"), volumes=ids)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_states_of_a_job_stay_in_order_and_are_repeated_until_taken() -> None:
    controller = Controller()
    controller.failures = [Unreachable("gone"), ServiceUnavailable("starting")]
    async with TaskSet() as tasks:
        box = Outbox(controller, tasks)
        for state in (JobState.PENDING, JobState.STARTING, JobState.RUNNING):
            box.job(job("j", state))
        await eventually(lambda: not len(box))
    assert controller.told == ["j pending", "j starting", "j up"]


async def test_a_refusal_is_not_repeated_and_holds_nothing_up() -> None:
    controller = Controller()
    controller.failures = [ValidationError("state", "is not one")]
    async with TaskSet() as tasks:
        box = Outbox(controller, tasks)
        box.job(job("j", JobState.PENDING))
        box.job(job("j", JobState.RUNNING))
        await eventually(lambda: not len(box))
    assert controller.told == ["j up"]


async def test_a_volume_comes_before_its_job_and_the_end_of_a_scale_request_after_all_jobs() -> None:
    controller = Controller()
    async with TaskSet() as tasks:
        box = Outbox(controller, tasks)
        controller.open.clear()
        box.volume(Volume(VolumeID("v"), HostID("h"), "a", "r", "web", "/data"))
        box.job(job("j", JobState.RUNNING, "v"))
        box.job(job("k", JobState.RUNNING))
        box.scale_complete(KEY, ScaleRequest(id="s", app="a", release="r", state="pending"))
        controller.open.set()
        await eventually(lambda: not len(box))
    assert controller.told[-1] == "scale complete"
    assert controller.told.index("v pending") < controller.told.index("j up")


async def test_who_leaves_tells_what_is_left_but_does_not_wait_for_ever() -> None:
    controller = Controller()
    async with TaskSet() as tasks:
        box = Outbox(controller, tasks)
        for number in range(50):
            box.job(job(f"j{number}", JobState.PENDING))
        await box.flush(timedelta(seconds=10))
        assert len(controller.told) == 50
        controller.open.clear()
        box.job(job("late", JobState.PENDING))
        await box.flush(timedelta(seconds=0.05))
        assert len(box) == 1
        controller.open.set()


async def test_while_the_controller_is_away_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LIMIT", 3)
    controller = Controller()
    controller.open.clear()
    async with TaskSet() as tasks:
        box = Outbox(controller, tasks)
        for number in range(5):
            box.job(job(f"j{number}", JobState.PENDING))
        box.job(job("j0", JobState.RUNNING))
        assert len(box) == 4
        controller.open.set()
        await eventually(lambda: not len(box))
        box.job(job("j4", JobState.RUNNING))
        await eventually(lambda: "j4 up" in controller.told)
