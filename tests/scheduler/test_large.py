"""A thousand hosts with ten thousand jobs: what must hold at every step, and that all is well again after losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from time import perf_counter

import pytest

from flynn.scheduler.engine import Engine
from flynn.scheduler.events import Event, FormationReceived, HostSeen, JobReport, ServiceListed
from flynn.scheduler.model import Formation, FormationKey, JobID, JobState, VolumeID
from flynn.types.app import App
from flynn.types.formation import ScaleRequest
from flynn.types.release import ProcessType, Release, VolumeReq
from tests.scheduler.test_simulation import SimHost, Simulation

pytestmark = pytest.mark.slow

HOSTS, APPS = 1000, 500
COUNTS = {"web": 6, "worker": 12, "db": 2}  # of each app
SECONDS = 240  # of real time, for all of it: 20 on a quiet machine


class Large(Simulation):
    """Apps with a service of their own each, and checks that cost what has changed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, hosts=HOSTS, trouble=0)
        self.listed: dict[str, set[JobID]] = defaultdict(set)
        self.checked = 0

    def scale(self, app: str, wanted: dict[str, int]) -> None:
        self.versions += 1
        release = Release(
            id="rel",
            processes={
                "web": ProcessType(service=f"{app}-web"),
                "worker": ProcessType(),
                "db": ProcessType(volumes=[VolumeReq(path="/data")]),
            },
        )
        request = ScaleRequest(id=f"s{self.versions}", app=app, release="rel", state="pending", new_processes=wanted)
        stored = Formation(App(id=app, name=app), release, wanted=wanted, updated_at=self.now)
        self.formations[app] = stored
        self.tell(FormationReceived(replace(stored, scale_request=request)))

    def tell_service(self, job: JobReport) -> None:
        listed = self.listed[job.app]
        listed.add(job.id) if job.id in self.serving else listed.discard(job.id)
        self.tell(ServiceListed(f"{job.app}-web", frozenset(listed)))

    def step(self, n: int, event: Event) -> None:
        engine = self.engines[n]
        actions = engine.step([event], self.now)
        for action in actions:
            self.perform(n, action)
        assert sum(1 for other in self.engines if other.leader) <= 1
        touched = {job.key for action in actions if (job := getattr(action, "job", None)) and hasattr(job, "key")}
        if engine.leader and engine.settled:
            for key in touched:
                self.check_formation(engine, key)

    def check_formation(self, engine: Engine, key: FormationKey) -> None:
        """Never more than wanted, but for one that moves; never two that write to one volume."""
        formation = engine.world.formations[key]
        self.checked += 1
        present = [job for job in engine.world.jobs_of(key) if job.state.counts]
        surplus = Counter(job.type for job in present)
        surplus.subtract(formation.targets(()))
        assert sum(count for count in surplus.values() if count > 0) <= 1, f"{key}: {surplus}"
        writers: Counter[VolumeID] = Counter(id for job in present for id in job.volumes)
        assert all(count == 1 for count in writers.values()), f"{key}: {writers}"

    def some(self, share: float) -> list[SimHost]:
        return self.random.sample(list(self.hosts.values()), int(share * len(self.hosts)))

    def sync_all(self) -> None:
        assert self.leader is not None
        self.sync(self.leader)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_hosts_lose_and_regain_a_tenth_of_themselves_under_two_leaders(seed: int) -> None:
    began = perf_counter()
    simulation = Large(seed)
    for host in simulation.hosts.values():
        for n in range(2):
            simulation.step(n, HostSeen(host.id, {}))
    for n in range(APPS):
        simulation.scale(f"a{n}", dict(COUNTS))
    simulation.run(2)
    simulation.lead(0)
    simulation.run(15)
    assert sum(len(host.active()) for host in simulation.hosts.values()) == APPS * sum(COUNTS.values()) == 10_000

    lost = simulation.some(0.1)
    for number, host in enumerate(lost):
        simulation.lose_host(host, with_jobs=number % 2 == 0)
        if number == len(lost) // 2:
            simulation.run(3)
            simulation.lead(1)  # in the middle of it
    for n in range(0, APPS, 25):
        simulation.scale(f"a{n}", {"web": simulation.random.randrange(12), "worker": 6, "db": 2})
    simulation.run(20)
    stateless = sum(1 for host in simulation.hosts.values() if host.reachable for j in host.active() if j.type != "db")
    wanted = sum(f.wanted["web"] + f.wanted["worker"] for f in simulation.formations.values())
    assert stateless == wanted, "twenty seconds after the loss everything that has no data runs elsewhere"

    for host in lost:
        simulation.return_host(host)
    simulation.run(20)
    simulation.lead(0)
    for _ in range(3):
        simulation.run(30)
        simulation.sync_all()
    simulation.run(30)
    simulation.check()
    assert simulation.checked > 10_000
    assert not [job for job in simulation.engines[0].world.jobs.values() if job.state is JobState.BLOCKED]
    seconds = perf_counter() - began
    print(f"\n{simulation.starts} starts, {simulation.checked} checks in {seconds:.1f} s")
    assert seconds < SECONDS
