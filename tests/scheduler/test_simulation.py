"""Two schedulers against a small cluster on virtual time, with everything going wrong that can, from a seed.

Hosts vanish and return (with or without their jobs), starts are refused or only seem to fail, jobs crash, reports come
twice, late and out of order, leadership moves, formations change. Then the weather clears, and what must hold then is
checked against what really runs: the counts are reached, nothing runs that nobody wants, and the controller's books
say the same.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from time import perf_counter

import pytest

from flynn.scheduler.engine import Engine
from flynn.scheduler.events import (
    Action,
    CheckHost,
    CompleteScaleRequest,
    Event,
    FollowHost,
    FormationReceived,
    FormationsListed,
    HostChecked,
    HostGone,
    HostSeen,
    JobReport,
    JobReported,
    JobsListed,
    LeadershipChanged,
    ListingFailed,
    PersistJob,
    PersistVolume,
    RecordedJob,
    RecordsListed,
    Resync,
    ServiceListed,
    StartDone,
    StartJob,
    StopDone,
    StopJob,
    Tick,
    VolumeRecorded,
    VolumesListed,
    VolumesRecorded,
)
from flynn.scheduler.model import WIRE_STATE, Formation, HostID, Job, JobID, JobState, Volume, VolumeState
from flynn.types.app import App
from flynn.types.formation import ScaleRequest
from flynn.types.host import JobStatus
from flynn.types.release import ProcessType, Release, VolumeReq

START = datetime(2026, 1, 1, tzinfo=UTC)

RELEASE = Release(
    id="rel",
    processes={
        "web": ProcessType(service="shop-web"),
        "worker": ProcessType(),
        "agent": ProcessType(omni=True),
        "db": ProcessType(volumes=[VolumeReq(path="/data")]),
    },
)


@dataclass
class SimHost:
    id: HostID
    reachable: bool = True
    jobs: dict[JobID, JobReport] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)

    def active(self) -> list[JobReport]:
        return [job for job in self.jobs.values() if not job.status.down]


class Simulation:
    def __init__(self, seed: int, *, hosts: int = 4, trouble: float = 0.2) -> None:
        self.random = Random(seed)
        self.now = START
        self.trouble = trouble
        self.agenda: list[tuple[datetime, int, Callable[[], None]]] = []
        self.serial = 0
        self.ids = 0
        self.hosts = {HostID(f"h{n}"): SimHost(HostID(f"h{n}")) for n in range(hosts)}
        self.in_directory = set(self.hosts)
        self.engines = [Engine(Random(seed * 2 + n), self.new_id) for n in range(2)]
        self.leader: int | None = None
        self.books: dict[JobID, RecordedJob] = {}
        self.volume_books: dict[str, Volume] = {}
        self.formations: dict[str, Formation] = {}
        self.serving: set[JobID] = set()
        self.completed: list[str] = []
        self.versions = 0
        self.starts = 0
        self.several_leaders = False  # the directory tells everybody who leads

    def new_id(self) -> str:
        self.ids += 1
        return f"u{self.ids}"

    # Time

    def at(self, delay: float, body: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.agenda, (self.now + timedelta(seconds=delay), self.serial, body))

    def run(self, seconds: float) -> None:
        end = self.now + timedelta(seconds=seconds)
        while True:
            dues = [max(due, self.now) for engine in self.engines if (due := engine.next_due()) is not None]
            moments = [*dues, self.agenda[0][0]] if self.agenda else dues
            if not moments or min(moments) > end:
                break
            self.now = min(moments)
            if self.agenda and self.agenda[0][0] <= self.now:
                heapq.heappop(self.agenda)[2]()
                continue
            for n, engine in enumerate(self.engines):
                if (due := engine.next_due()) is not None and due <= self.now:
                    self.step(n, Tick())
        self.now = end

    def delay(self, usual: float = 0.02) -> float:
        if self.random.random() < self.trouble:
            return self.random.uniform(0, 5)
        return self.random.uniform(0, usual)

    # Messages

    def step(self, n: int, event: Event) -> None:
        for action in self.engines[n].step([event], self.now):
            self.perform(n, action)
        assert self.several_leaders or sum(1 for engine in self.engines if engine.leader) <= 1
        if self.engines[n].leader and self.engines[n].settled:
            self.check_counts(self.engines[n])

    def tell(self, event: Event, n: int | None = None) -> None:
        """To one scheduler or to all; under bad weather late and twice."""
        for target in range(2) if n is None else (n,):
            copies = 2 if self.random.random() < self.trouble / 4 else 1
            for _ in range(copies):
                self.at(self.delay(), lambda target=target: self.step(target, event))  # type: ignore[misc]

    def perform(self, n: int, action: Action) -> None:
        engine = self.engines[n]
        match action:
            case StartJob(job, _, volumes):
                assert engine.leader, "only the leader starts jobs"
                self.starts += 1
                self.at(self.delay(), lambda: self.start_job(n, job, volumes))
            case StopJob(job, host):
                assert engine.leader, "only the leader stops jobs"
                self.at(self.delay(), lambda: self.stop_job(n, job, host))
            case PersistJob(job):
                assert engine.leader or self.several_leaders, "only the leader keeps the books"
                self.write(job)
            case PersistVolume(volume):
                self.volume_books[volume.id] = volume
            case CompleteScaleRequest(_, request):
                self.completed.append(request.id)
            case FollowHost(host):
                self.at(self.delay(), lambda: self.list_host(n, host))
            case CheckHost(host):
                self.at(self.delay(), lambda: self.step(n, HostChecked(host, self.hosts[host].reachable)))
            case Resync():
                self.at(self.delay(), lambda: self.sync(n))
            case _:
                pass

    def write(self, job: Job) -> None:
        self.books[job.id] = RecordedJob(
            job.id, job.app, job.release, job.type, WIRE_STATE[job.state], job.host, job.restarts, job.run_at
        )

    def sync(self, n: int) -> None:
        for host in self.engines[n].world.hosts:
            self.list_host(n, host)
        if self.trouble:
            self.tell_volumes(n)
        else:
            for volume in self.volume_books.values():
                self.step(n, VolumeRecorded(volume))
            self.step(n, VolumesRecorded())
        self.tell(FormationsListed(tuple(f for f in self.formations.values() if f.active), self.now), n)
        self.tell(RecordsListed(tuple(r for r in self.books.values() if r.state != "down"), self.now), n)

    def tell_volumes(self, n: int) -> None:
        for volume in self.volume_books.values():
            self.tell(VolumeRecorded(volume), n)
        self.at(6, lambda: self.step(n, VolumesRecorded()))

    def list_host(self, n: int, id: HostID) -> None:
        host = self.hosts[id]
        if host.reachable:
            self.tell(VolumesListed(id, tuple(host.volumes.values()), self.now), n)
            self.tell(JobsListed(id, tuple(host.jobs.values()), self.now), n)
        else:
            self.tell(ListingFailed(id), n)

    # Hosts

    def start_job(self, n: int, job: Job, volumes: tuple[Volume, ...]) -> None:
        assert job.host is not None
        host = self.hosts[job.host]
        refused = not host.reachable or self.random.random() < self.trouble
        if refused and (not host.reachable or self.random.random() < 0.7):
            self.tell(StartDone(job.id, host.id, (), "refused"), n)
            return
        if any(set(other.volumes) & {v.id for v in volumes} for other in host.active() if other.id != job.id):
            self.tell(StartDone(job.id, host.id, (), "volume in use"), n)
            return
        for volume in volumes:
            host.volumes[volume.id] = replace(volume, state=VolumeState.CREATED, created_at=self.now, job=None)
        if job.id not in host.jobs:
            self.report(
                host,
                JobReport(
                    host=host.id,
                    id=job.id,
                    app=job.app,
                    release=job.release,
                    type=job.type,
                    in_formation=True,
                    status=JobStatus.STARTING,
                    created_at=self.now,
                    volumes=job.volumes,
                ),
            )
            self.at(self.delay(0.1), lambda: self.now_running(host, job.id))
        # The request took effect, though the answer may be lost.
        self.tell(StartDone(job.id, host.id, tuple(v.id for v in volumes), "no answer" if refused else ""), n)

    def report(self, host: SimHost, job: JobReport) -> None:
        host.jobs[job.id] = job
        if host.reachable:
            self.tell(JobReported(job))

    def now_running(self, host: SimHost, id: JobID) -> None:
        job = host.jobs.get(id)
        if job is None or job.status.down:
            return
        self.report(host, replace(job, status=JobStatus.RUNNING, started_at=self.now))
        if job.type == "web":
            self.at(self.delay(0.3), lambda: self.serve(host, id))
        if self.random.random() < self.trouble:
            self.at(self.random.uniform(1, 60), lambda: self.end_job(host, id, JobStatus.CRASHED))

    def serve(self, host: SimHost, id: JobID) -> None:
        if id in host.jobs and not host.jobs[id].status.down:
            self.serving.add(id)
            self.tell_service(host.jobs[id])

    def tell_service(self, job: JobReport) -> None:
        """The service of a job lists it now, or does not any more."""
        self.tell(ServiceListed("shop-web", frozenset(self.serving)))

    def end_job(self, host: SimHost, id: JobID, status: JobStatus = JobStatus.DONE) -> None:
        job = host.jobs.get(id)
        if job is None or job.status.down:
            return
        if id in self.serving:
            self.serving.discard(id)
            self.tell_service(job)
        self.report(host, replace(job, status=status, ended_at=self.now, exit_status=0))

    def stop_job(self, n: int, id: JobID, host: HostID) -> None:
        if self.hosts[host].reachable and self.random.random() >= self.trouble / 2:
            self.end_job(self.hosts[host], id)
        self.tell(StopDone(id, host), n)

    # Weather

    def lead(self, n: int) -> None:
        if self.leader is not None and self.leader != n:
            self.step(self.leader, LeadershipChanged(False))
        self.leader = n
        self.step(n, LeadershipChanged(True))

    def scale(self, app: str, wanted: dict[str, int]) -> None:
        self.versions += 1
        request = ScaleRequest(id=f"s{self.versions}", app=app, release="rel", state="pending", new_processes=wanted)
        formation = Formation(
            app=App(id=app, name=app), release=RELEASE, wanted=wanted, updated_at=self.now, scale_request=request
        )
        self.formations[app] = replace(formation, scale_request=None)
        self.tell(FormationReceived(formation))

    def lose_host(self, host: SimHost, *, with_jobs: bool) -> None:
        host.reachable = False
        if with_jobs:
            for job in host.active():
                host.jobs[job.id] = replace(job, status=JobStatus.FAILED, ended_at=self.now)
                self.serving.discard(job.id)
        self.at(self.random.uniform(0, 10), lambda: self.leave_directory(host))

    def leave_directory(self, host: SimHost) -> None:
        if not host.reachable:
            self.in_directory.discard(host.id)
            self.tell(HostGone(host.id))

    def return_host(self, host: SimHost) -> None:
        host.reachable = True
        self.in_directory.add(host.id)
        for n, engine in enumerate(self.engines):
            self.step(n, HostSeen(host.id, {}))
            if host.id in engine.world.hosts:
                self.at(self.delay(), lambda n=n: self.list_host(n, host.id))  # type: ignore[misc]

    def drain(self, host: SimHost, draining: bool) -> None:
        for n in range(len(self.engines)):
            self.step(n, HostSeen(host.id, {}, shutting_down=draining))
        if draining:
            for job in host.active():
                self.at(self.random.uniform(0, 5), lambda id=job.id: self.end_job(host, id))  # type: ignore[misc]

    def storm(self, seconds: float) -> None:
        end = self.now + timedelta(seconds=seconds)
        while self.now < end:
            self.run(self.random.uniform(0.5, 15))
            match self.random.randrange(7):
                case 0:
                    self.lead(self.random.randrange(2))
                case 1 | 2:
                    wanted = {"web": self.random.randrange(4), "worker": self.random.randrange(6)}
                    wanted |= {"agent": self.random.randrange(2), "db": self.random.randrange(2)}
                    self.scale(self.random.choice(["shop", "blog"]), wanted)
                case 3:
                    host = self.random.choice(list(self.hosts.values()))
                    if host.reachable:
                        self.lose_host(host, with_jobs=self.random.random() < 0.5)
                case 4 | 5:
                    for host in self.hosts.values():
                        if not host.reachable and self.random.random() < 0.6:
                            self.return_host(host)
                case 6:
                    if self.leader is not None:
                        self.sync(self.leader)

    def clear_up(self) -> None:
        self.trouble = 0
        for host in self.hosts.values():
            self.return_host(host)
        for app in ("shop", "blog"):
            if app in self.formations:
                self.tell(FormationReceived(self.formations[app]))
        for _ in range(16):
            self.run(30)
            assert self.leader is not None
            self.tell(ServiceListed("shop-web", frozenset(self.serving)))
            for n in range(2):
                self.sync(n)
        self.run(30)

    # What must hold in the end

    def check_counts(self, engine: Engine) -> None:
        """A leader that has decided has asked for what is wanted and for one to move, whatever has happened before."""
        hosts = list(engine.world.hosts.values())
        for key, formation in engine.world.formations.items():
            targets = formation.targets(hosts)
            present = [job for job in engine.world.jobs_of(key) if job.state.counts]
            writers = Counter(id for job in present for id in job.volumes)
            assert max(writers.values(), default=0) <= 1, f"{key}: {writers} write to one volume"
            surplus = Counter(job.type for job in present if job.type)
            surplus.subtract(targets)
            assert max(surplus.values(), default=0) <= 1, f"{key}: {surplus} more than wanted"
            assert sum(count for count in surplus.values() if count > 0) <= 1, f"{key}: {surplus} more than wanted"

    def check(self) -> None:
        running: Counter[tuple[str, str]] = Counter()
        for host in self.hosts.values():
            for job in host.active():
                assert job.status is JobStatus.RUNNING
                running[job.app, job.type] += 1
        hosts = list(self.engines[self.leader or 0].world.hosts.values())
        assert len(hosts) == len(self.hosts)
        wanted = Counter(
            {
                (app, type): count
                for app, formation in self.formations.items()
                for type, count in formation.targets(hosts).items()
            }
        )
        assert running == +wanted
        for host in self.hosts.values():
            agents = Counter(job.app for job in host.active() if job.type == "agent")
            assert all(count == 1 for count in agents.values()), "one agent on each host"
        for app, formation in self.formations.items():
            for type in ("web", "worker"):
                load = [sum(1 for job in h.active() if (job.app, job.type) == (app, type)) for h in self.hosts.values()]
                assert max(load) - min(load) <= 1, f"{formation.wanted[type]} of {type} are spread as {load}"
        alive = {job.id for host in self.hosts.values() for job in host.active()}
        books = {record.id for record in self.books.values() if record.state != "down"}
        assert books == alive, "the books say what runs"
        assert all(self.books[id].state == "up" for id in alive)


@pytest.mark.parametrize("seed", range(40))
def test_after_the_storm_everything_wanted_runs_and_nothing_else(seed: int) -> None:
    simulation = Simulation(seed)
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.scale("shop", {"web": 2, "worker": 3, "agent": 1, "db": 1})
    simulation.run(1)
    simulation.lead(0)
    simulation.storm(600)
    if simulation.leader is None:
        simulation.lead(1)
    simulation.clear_up()
    simulation.check()


def calm(hosts: int = 3) -> Simulation:
    simulation = Simulation(1, hosts=hosts, trouble=0)
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.run(1)
    simulation.lead(0)
    return simulation


def test_scaling_up_and_down_in_calm_weather() -> None:
    simulation = calm()
    simulation.run(2)
    simulation.scale("shop", {"web": 3})
    simulation.run(2)
    assert [len(host.active()) for host in simulation.hosts.values()] == [1, 1, 1]
    assert simulation.completed == ["s1"]
    simulation.scale("shop", {"web": 0})
    simulation.run(2)
    assert [len(host.active()) for host in simulation.hosts.values()] == [0, 0, 0]
    assert simulation.completed == ["s1", "s2"]


def test_the_follower_takes_over_without_starting_anything_twice() -> None:
    simulation = calm()
    simulation.scale("shop", {"web": 3, "agent": 1})
    simulation.run(5)
    started = simulation.ids
    simulation.lead(1)
    simulation.run(5)
    assert simulation.ids == started
    simulation.check()


def test_a_dead_nodes_jobs_are_replaced_and_data_is_waited_for() -> None:
    simulation = calm()
    simulation.scale("shop", {"worker": 6, "db": 1})
    simulation.run(5)
    dead = next(host for host in simulation.hosts.values() if any(job.type == "db" for job in host.active()))
    simulation.lose_host(dead, with_jobs=True)
    simulation.run(20)
    alive = [job.type for host in simulation.hosts.values() for job in host.active()]
    assert sorted(alive) == ["worker"] * 6
    blocked = [job for job in simulation.engines[0].world.jobs.values() if job.state is JobState.BLOCKED]
    assert [(job.type, job.reason) for job in blocked] == [("db", f"host is down: its volume is on {dead.id}")]
    simulation.return_host(dead)
    simulation.run(5)
    assert [job.type for job in dead.active()].count("db") == 1


def test_a_scheduler_that_begins_while_a_host_is_away_waits_for_the_data_there_too() -> None:
    simulation = calm()
    simulation.scale("shop", {"db": 1})
    simulation.run(5)
    host = next(host for host in simulation.hosts.values() if host.active())
    simulation.lose_host(host, with_jobs=True)
    simulation.run(20)
    simulation.engines[1] = Engine(Random(9), simulation.new_id)  # it has never seen that host
    for other in simulation.hosts.values():
        if other is not host:
            simulation.return_host(other)
    simulation.tell(FormationReceived(simulation.formations["shop"]))
    simulation.run(1)
    simulation.lead(1)
    simulation.run(60)
    assert not any(other.active() for other in simulation.hosts.values())
    assert [job.reason for job in simulation.engines[1].world.jobs.values()] == [
        f"host is down: its volume is on {host.id}"
    ]
    simulation.return_host(host)
    simulation.run(5)
    assert [job.type for job in host.active()] == ["db"]
    assert len(host.volumes) == 1


def test_a_volume_that_was_decommissioned_before_its_host_was_seen_is_not_used() -> None:
    simulation = calm()
    simulation.scale("shop", {"db": 1})
    simulation.run(5)
    host = next(host for host in simulation.hosts.values() if host.active())
    (old,) = simulation.volume_books.values()
    simulation.volume_books[old.id] = replace(old, decommissioned=True)
    simulation.end_job(host, host.active()[0].id)
    simulation.engines[1] = Engine(Random(9), simulation.new_id)
    simulation.step(1, VolumeRecorded(simulation.volume_books[old.id]))
    for other in simulation.hosts.values():
        simulation.return_host(other)
    simulation.tell(FormationReceived(simulation.formations["shop"]), 1)
    simulation.run(0)
    simulation.lead(1)
    simulation.run(30)
    (job,) = [job for other in simulation.hosts.values() for job in other.active()]
    assert old.id not in job.volumes


def test_all_nodes_die_at_once_and_come_back_empty() -> None:
    simulation = calm()
    simulation.scale("shop", {"web": 3, "worker": 2, "agent": 1, "db": 1})
    simulation.run(5)
    for host in simulation.hosts.values():
        simulation.lose_host(host, with_jobs=True)
    # The schedulers died with them: new ones know nothing.
    simulation.engines = [Engine(Random(n), simulation.new_id) for n in range(2)]
    simulation.leader = None
    simulation.run(30)
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.tell(FormationReceived(simulation.formations["shop"]))
    simulation.run(2)
    simulation.lead(1)
    simulation.run(10)
    simulation.check()


def test_a_full_reconcile_of_a_thousand_hosts_and_ten_thousand_jobs_takes_less_than_a_second() -> None:
    now = START
    ids = iter(range(10**6))
    engine = Engine(Random(1), lambda: f"u{next(ids)}")
    hosts = [HostSeen(HostID(f"h{n}"), {"zone": str(n % 3)}) for n in range(1000)]
    formations = tuple(
        Formation(
            app=App(id=f"a{n}", name=f"app{n}"),
            release=Release(id="r", processes={"web": ProcessType(), "worker": ProcessType()}),
            wanted={"web": 5, "worker": 5},
            tags={"worker": {"zone": str(n % 3)}},
            updated_at=now,
        )
        for n in range(1000)
    )
    engine.step(hosts, now)
    engine.step([FormationReceived(formation) for formation in formations], now)
    engine.step([LeadershipChanged(True)], now)
    engine.step([FormationsListed(formations, now), RecordsListed((), now), VolumesRecorded()], now)
    engine.step([JobsListed(host.host, (), now) for host in hosts[1:]], now)
    began = perf_counter()
    actions = engine.step([JobsListed(hosts[0].host, (), now)], now)
    placing = perf_counter() - began
    starts = [action for action in actions if isinstance(action, StartJob)]
    assert len(starts) == 10_000
    load = Counter(start.job.host for start in starts)
    assert max(load.values()) <= 40
    began = perf_counter()
    engine.step([LeadershipChanged(False), LeadershipChanged(True)], now)
    engine._awaited.clear()
    engine._hosts.unlisted.clear()
    engine.step([Tick()], now)
    again = perf_counter() - began
    assert placing + again < 4, f"placing {placing:.2f} s, again {again:.2f} s"  # 1 s on a machine of its own
