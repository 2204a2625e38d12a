"""A new release in the place of the old one: on its volumes, and only when it is really gone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random

import pytest
from pytest import param

from flynn.scheduler.engine import Engine
from flynn.scheduler.events import (
    Action,
    Event,
    FormationReceived,
    FormationsListed,
    HostSeen,
    JobReport,
    JobReported,
    JobsListed,
    LeadershipChanged,
    RecordsListed,
    StartDone,
    StartJob,
    StopJob,
    Tick,
    VolumesRecorded,
)
from flynn.scheduler.model import Formation, HostID, JobID, JobState, VolumeID
from flynn.types.app import SYSTEM_APP, SYSTEM_CRITICAL, VOLUME_SCOPE, App
from flynn.types.host import JobStatus
from flynn.types.release import ProcessType, Release, VolumeReq

NODE = HostID("node1")
SYSTEM = {SYSTEM_APP: "true"}


class Stage:
    """One host that does what it is told at once, except for stopping, which takes until `stopped`."""

    def __init__(self) -> None:
        ids = count(1)
        self.engine = Engine(Random(1), lambda: f"{next(ids):08d}-0000-4000-8000-000000000000")
        self.now = datetime(2024, 5, 1, tzinfo=UTC)
        self.started: list[StartJob] = []
        self.crashing = ""  # jobs of this release end before they are up
        self.stops: list[StopJob] = []
        self.tell(HostSeen(NODE, {}), LeadershipChanged(True))
        self.tell(JobsListed(NODE, (), self.now), FormationsListed((), self.now), RecordsListed((), self.now))
        self.tell(VolumesRecorded())

    def tell(self, *events: Event) -> None:
        self.now += timedelta(milliseconds=100)
        self._perform(self.engine.step(events, self.now))

    def wait(self, seconds: float) -> None:
        until = self.now + timedelta(seconds=seconds)
        while self.now < until:
            self.tell(Tick())

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, StopJob):
                self.stops.append(action)
            if isinstance(action, StartJob):
                self.started.append(action)
                self.tell(StartDone(action.job.id, NODE, tuple(v.id for v in action.volumes), ""))
                crashes = action.job.release == self.crashing
                self.report(action, JobStatus.CRASHED if crashes else JobStatus.RUNNING)

    def report(self, start: StartJob, status: JobStatus, id: str = "", *, resurrected: bool = False) -> None:
        job = start.job
        self.tell(
            JobReported(
                JobReport(
                    host=NODE,
                    resurrected=resurrected,
                    id=JobID(id) or job.id,
                    app=job.app,
                    release=job.release,
                    type=job.type,
                    in_formation=True,
                    status=status,
                    created_at=job.created_at,
                    started_at=self.now,
                    volumes=tuple(volume.id for volume in start.volumes),
                )
            )
        )

    def scale(
        self, release: str, wanted: int, *, meta: dict[str, str], strategy: str = "sirenia", at: datetime | None = None
    ) -> None:
        app = App(id="db", name="db", meta=meta, strategy=strategy)
        process = ProcessType(volumes=[VolumeReq(path="/data")], omni=strategy == "discoverd-meta")
        formation = Formation(app, Release(id=release, processes={"db": process}), wanted={"db": wanted}, updated_at=at)
        self.tell(FormationReceived(formation))

    def data(self, index: int) -> VolumeID:
        return self.started[index].volumes[0].id


def test_a_job_that_hands_over_shares_its_volume_with_its_successor() -> None:
    stage = Stage()
    stage.scale("r1", 1, meta=SYSTEM, strategy="discoverd-meta")
    stage.scale("r2", 1, meta=SYSTEM, strategy="discoverd-meta")
    stage.wait(1)
    assert [start.job.release for start in stage.started] == ["r1", "r2"]
    assert not stage.stops
    assert stage.data(0) == stage.data(1)
    stage.scale("r1", 0, meta=SYSTEM, strategy="discoverd-meta")
    stage.wait(1)
    assert len(stage.stops) == 1
    stage.report(stage.started[0], JobStatus.DONE)
    stage.wait(1)
    stage.scale("r3", 1, meta=SYSTEM, strategy="discoverd-meta")
    stage.wait(1)
    assert [start.job.release for start in stage.started] == ["r1", "r2", "r3"]
    assert stage.data(0) == stage.data(2)


def test_a_new_release_waits_for_the_old_one_and_takes_its_volume() -> None:
    stage = Stage()
    stage.scale("r1", 1, meta=SYSTEM)
    stage.scale("r1", 0, meta=SYSTEM)
    stage.scale("r2", 1, meta=SYSTEM)
    stage.wait(5)
    assert len(stage.stops) == 1 and len(stage.started) == 1, "the old one has been told, and still runs"
    assert [job.reason for job in stage.engine.world.jobs.values() if job.release == "r2"] == [
        f"waits for {stage.started[0].job.cluster_id} to end"
    ]
    stage.report(stage.started[0], JobStatus.DONE)
    stage.wait(1)
    assert [start.job.release for start in stage.started] == ["r1", "r2"]
    assert stage.data(0) == stage.data(1)


def test_the_same_release_scaled_down_and_up_keeps_its_data() -> None:
    stage = Stage()
    for wanted in (1, 0, 1):
        stage.scale("r1", wanted, meta={})
    stage.wait(2)
    assert len(stage.started) == 1
    stage.report(stage.started[0], JobStatus.DONE)
    stage.wait(1)
    assert stage.data(0) == stage.data(1)


@pytest.mark.parametrize(
    ("meta", "taken_over"),
    [
        param(SYSTEM, True, id="the platform's apps keep their data"),
        param({**SYSTEM, VOLUME_SCOPE: "release"}, False, id="unless they do not want it"),
        param({}, False, id="an app of a user gets new volumes with a release, as it always did"),
        param({VOLUME_SCOPE: "app"}, True, id="unless it says otherwise"),
    ],
)
def test_whose_volumes_outlive_a_release(meta: dict[str, str], taken_over: bool) -> None:
    stage = Stage()
    stage.scale("r1", 1, meta=meta)
    stage.scale("r1", 0, meta=meta)
    stage.report(stage.started[0], JobStatus.DONE)
    stage.scale("r2", 1, meta=meta)
    stage.wait(1)
    assert (stage.data(0) == stage.data(1)) is taken_over


def test_side_by_side_each_has_its_own_and_the_latest_data_are_taken_over() -> None:
    stage = Stage()
    stage.scale("r1", 1, meta=SYSTEM, strategy="one-by-one")
    stage.scale("r2", 1, meta=SYSTEM, strategy="one-by-one")
    assert stage.data(0) != stage.data(1)
    for index, release in enumerate(("r1", "r2")):
        stage.scale(release, 0, meta=SYSTEM, strategy="one-by-one")
        stage.report(stage.started[index], JobStatus.DONE)
    stage.scale("r3", 1, meta=SYSTEM, strategy="one-by-one")
    assert stage.data(2) == stage.data(1)


def test_a_database_that_does_not_start_makes_way_for_the_one_before() -> None:
    """Without a database the controller could not roll back. It does when it can, and has the last word."""
    stage = Stage()
    critical = {**SYSTEM, SYSTEM_CRITICAL: "true"}
    begun = stage.now
    stage.scale("r1", 1, meta=critical, at=begun)
    stage.crashing = "r2"
    swapped = begun + timedelta(seconds=1)
    stage.scale("r1", 0, meta=critical, at=swapped)
    stage.scale("r2", 1, meta=critical, at=swapped)
    stage.report(stage.started[0], JobStatus.DONE)
    stage.wait(20)
    assert [start.job.release for start in stage.started] == ["r1", *["r2"] * 6, "r1"]
    assert len({stage.data(index) for index in range(8)}) == 1
    for release, wanted in (("r1", 0), ("r2", 1)):
        stage.scale(release, wanted, meta=critical, at=swapped)  # the stream of the controller that is back repeats it
    stage.tell(FormationsListed((), stage.now))
    stage.wait(20)
    assert len(stage.started) == 8 and len(stage.stops) == 1
    decided = swapped + timedelta(seconds=60)
    stage.scale("r2", 0, meta=critical, at=decided)
    stage.scale("r1", 1, meta=critical, at=decided)
    stage.wait(5)
    assert len(stage.started) == 8 and len(stage.stops) == 1
    stage.scale("r1", 2, meta=critical, at=decided + timedelta(seconds=1))
    stage.wait(5)
    assert len(stage.started) == 9


def test_a_cluster_of_several_does_not_go_back_to_peers_that_its_data_have_left() -> None:
    stage = Stage()
    critical = {**SYSTEM, SYSTEM_CRITICAL: "true"}
    stage.scale("r1", 3, meta=critical)
    stage.scale("r2", 3, meta=critical)
    stage.scale("r1", 0, meta=critical)
    for old in stage.started[:3]:
        stage.report(old, JobStatus.DONE)
    stage.crashing = "r2"
    stage.report(stage.started[3], JobStatus.CRASHED)
    stage.wait(60)
    assert {start.job.release for start in stage.started[6:]} == {"r2"}
    assert len(stage.started) > 12


def test_nor_does_it_matter_that_its_host_brings_it_back_again_and_again() -> None:
    """Each job that a host brings back is new to the scheduler, and the last one has the volume until it is stopped."""
    stage = Stage()
    critical = {**SYSTEM, SYSTEM_CRITICAL: "true"}
    stage.scale("r1", 1, meta=critical)
    stage.scale("r1", 0, meta=critical)
    stage.scale("r2", 1, meta=critical)
    stage.report(stage.started[0], JobStatus.DONE)
    stage.wait(1)
    broken = stage.started[1]
    before = str(broken.job.id)
    stage.engine.world.put_job(replace(stage.engine.world.jobs[broken.job.id], state=JobState.STARTING))
    for number in range(6):
        successor = f"{number:08d}-1111-4000-8000-000000000000"
        stage.report(broken, JobStatus.CRASHED, before, resurrected=True)
        stage.report(broken, JobStatus.STARTING, successor)
        before = successor
    assert [stop.job for stop in stage.stops[1:]] == [before]
    assert len(stage.started) == 2, "the volume is not free yet"
    stage.report(broken, JobStatus.DONE, before)
    stage.wait(1)
    assert [start.job.release for start in stage.started] == ["r1", "r2", "r1"]
    assert stage.data(2) == stage.data(0)
