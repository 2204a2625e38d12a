"""Spreading what runs over the hosts there are: which job moves where, when none does, and that it comes to an end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from pytest import param

from flynn.scheduler.balance import MOVE_EVERY, next_move
from flynn.scheduler.events import FormationReceived, HostSeen
from flynn.scheduler.hosts import STEADY
from flynn.scheduler.model import Formation, Host, HostID, Job, JobID, JobState
from flynn.types.app import App
from flynn.types.release import Port, ProcessType, Release, Service, VolumeReq
from tests.scheduler.test_simulation import START, SimHost, Simulation, calm

R, S, P, X = JobState.RUNNING, JobState.STARTING, JobState.PENDING, JobState.STOPPING
H1, H2, H3 = (Host(HostID(id)) for id in ("h1", "h2", "h3"))


def formation(count: int, process: ProcessType | None = None, strategy: str = "all-at-once") -> Formation:
    release = Release(id="r", processes={"web": process or ProcessType(service="shop-web")})
    return Formation(app=App(id="a", name="shop", strategy=strategy), release=release, wanted={"web": count})


def jobs(*on: str, state: JobState = R) -> list[Job]:
    """The later one is the newer one."""
    return [
        Job(JobID(f"j{n}"), "a", "r", "web", state, START + timedelta(seconds=n), host=HostID(host))
        for n, host in enumerate(on)
    ]


def moved(wanted: Formation, present: list[Job], *hosts: Host) -> tuple[str, str] | None:
    move = next_move(wanted, present, {host.id: host for host in hosts}, START)
    return (move.job.id, move.to.id) if move is not None else None


@pytest.mark.parametrize(
    ("on", "hosts", "expected"),
    [
        param("112233", (H1, H2, H3), None, id="even"),
        param("11122", (H1, H2), None, id="a difference of one cannot be mended"),
        param("111222", (H1, H2, H3), ("j5", "h3"), id="the newest of the fullest goes to the emptiest"),
        param("112221", (H1, H2, H3), ("j4", "h3"), id="of equally full hosts one is chosen the same way each time"),
        param("1113", (H1, H3), ("j2", "h3"), id="a difference of two is enough"),
        param("111222", (H1, H2, replace(H3, shutting_down=True)), None, id="not to a host that is drained"),
        param("111222", (H1, H2, replace(H3, healthy=False)), None, id="nor to one under suspicion"),
        param("111222", (H1, H2, replace(H3, listed=False)), None, id="nor to one that the directory does not list"),
        param("111222", (H1, H2, replace(H3, steady_since=START - STEADY / 2)), None, id="nor to one just back"),
        param("111222", (H1, H2, replace(H3, steady_since=START - STEADY)), ("j5", "h3"), id="until it is steady"),
    ],
)
def test_which_job_moves_where(on: str, hosts: tuple[Host, ...], expected: tuple[str, str] | None) -> None:
    assert moved(formation(len(on)), jobs(*(f"h{n}" for n in on)), *hosts) == expected


def test_tags_say_where_a_type_may_be() -> None:
    tagged = replace(formation(3), tags={"web": {"disk": "ssd"}})
    here, there = replace(H1, tags={"disk": "ssd"}), replace(H2, tags={"disk": "ssd"})
    assert moved(tagged, jobs("h1", "h1", "h1"), here, H3) is None
    assert moved(tagged, jobs("h1", "h1", "h1"), here, there, H3) == ("j2", "h2")


@pytest.mark.parametrize("state", [S, P, X])
def test_a_type_with_jobs_on_their_way_is_left_alone(state: JobState) -> None:
    assert moved(formation(3), [*jobs("h1", "h1"), *jobs("h1", state=state)], H1, H2) is None
    assert moved(formation(4), jobs("h1", "h1", "h1"), H1, H2) is None, "one is missing"


@pytest.mark.parametrize(
    ("process", "strategy"),
    [
        param(ProcessType(omni=True), "all-at-once", id="omni"),
        param(ProcessType(volumes=[VolumeReq(path="/data")]), "all-at-once", id="with data"),
        param(ProcessType(data=True), "all-at-once", id="with data, the old way"),
        param(ProcessType(resurrect=True), "all-at-once", id="brought back by its host"),
        param(ProcessType(host_network=True), "all-at-once", id="in the host's network"),
        param(ProcessType(), "sirenia", id="of a database"),
        param(ProcessType(), "one-down-one-up", id="that cannot run beside another"),
        param(
            ProcessType(ports=[Port(port=80, proto="tcp", service=Service(name="shop"))]),
            "all-at-once",
            id="that would count as up before its port is in service",
        ),
    ],
)
def test_jobs_that_never_move(process: ProcessType, strategy: str) -> None:
    assert moved(formation(4, process, strategy), jobs("h1", "h1", "h1", "h1"), H1, H2) is None


# With the engine, on virtual time


def load(simulation: Simulation, type: str = "web") -> list[int]:
    return [sum(1 for job in host.active() if job.type == type) for host in simulation.hosts.values()]


def after_a_loss() -> tuple[Simulation, SimHost]:
    """Six jobs on three hosts, one of which was lost, and has just come back."""
    simulation = calm(3)
    simulation.scale("shop", {"web": 6, "worker": 2, "agent": 1, "db": 1})
    simulation.run(40)
    assert load(simulation) == [2, 2, 2]
    lost = next(host for host in simulation.hosts.values() if all(job.type != "db" for job in host.active()))
    simulation.lose_host(lost, with_jobs=True)
    simulation.run(30)
    assert sorted(load(simulation)) == [0, 3, 3]
    simulation.return_host(lost)
    return simulation, lost


def test_after_a_host_is_back_its_share_moves_there_while_all_stay_in_service() -> None:
    simulation, _ = after_a_loss()
    began, seconds = simulation.now, 0
    while load(simulation) != [2, 2, 2]:
        simulation.run(1)
        seconds += 1
        assert len(simulation.serving) >= 6, "the new one serves before the old one stops"
        assert sum(load(simulation)) <= 7, "one at a time"
        assert seconds < 60
    assert simulation.now - began >= STEADY + MOVE_EVERY
    moved = [job for job in simulation.engines[0].world.jobs.values() if job.reason.startswith("moved to")]
    assert [job.type for job in moved] == ["web", "web"]
    starts = simulation.starts
    simulation.run(3600)
    assert simulation.starts == starts, "and nothing moves any more"
    simulation.check()


def test_nothing_moves_while_a_host_is_drained() -> None:
    simulation, lost = after_a_loss()
    other = next(host for host in simulation.hosts.values() if host is not lost)
    for n in range(2):
        simulation.step(n, HostSeen(other.id, {}, shutting_down=True))
    simulation.run(300)
    assert load(simulation)[list(simulation.hosts.values()).index(lost)] == 0
    simulation.drain(other, draining=False)
    simulation.run(60)
    assert load(simulation) == [2, 2, 2]


def test_nothing_moves_during_a_deployment_and_another_release_that_stays_is_none() -> None:
    simulation, _ = after_a_loss()
    app = App(id="shop", name="shop", deploy_timeout=120)
    next_release = Formation(
        app, Release(id="r2", processes={"web": ProcessType()}), wanted={"web": 1}, updated_at=simulation.now
    )
    simulation.formations["shop2"] = next_release
    simulation.tell(FormationReceived(next_release))
    simulation.tell(FormationReceived(replace(simulation.formations["shop"], app=app)))
    simulation.run(160)
    old = [sum(1 for j in h.active() if j.type == "web" and j.release == "rel") for h in simulation.hosts.values()]
    assert sorted(old) == [0, 3, 3]
    simulation.run(60)
    old = [sum(1 for j in h.active() if j.type == "web" and j.release == "rel") for h in simulation.hosts.values()]
    assert old == [2, 2, 2], "a step of a deployment does not take so long"


def test_a_job_that_does_not_come_up_there_is_given_up_and_the_formation_is_left_alone() -> None:
    simulation, lost = after_a_loss()
    serve = simulation.serve
    simulation.serve = lambda host, id: None if host is lost else serve(host, id)  # type: ignore[method-assign]
    simulation.run(100)
    assert sum(load(simulation)) == 7
    simulation.run(100)
    assert sorted(load(simulation)) == [0, 3, 3]
    starts = simulation.starts
    simulation.run(240)
    assert simulation.starts == starts
    simulation.serve = serve  # type: ignore[method-assign]
    simulation.run(120)
    assert load(simulation) == [2, 2, 2]


def test_a_leader_that_takes_over_in_the_middle_of_a_move_stops_one_job_too_many_and_no_other() -> None:
    simulation, _ = after_a_loss()
    for _ in range(1000):
        if sum(load(simulation)) == 7:
            break
        simulation.run(0.05)
    simulation.lead(1)
    for _ in range(60):
        simulation.run(1)
        assert len(simulation.serving) >= 6
    assert load(simulation) == [2, 2, 2]


def test_scaling_down_leaves_what_stays_spread() -> None:
    simulation, _ = after_a_loss()
    simulation.scale("shop", {"web": 3})
    simulation.run(5)
    assert sorted(load(simulation)) == [0, 1, 2]


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens to hosts, jobs, counts and leaders: in the end all is even, and stays as it is.

    That there is at most one job too many at every moment is checked by the simulation at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.simulation = calm(4)
        self.simulation.scale("shop", {"web": 4, "worker": 3, "agent": 1, "db": 1})
        self.simulation.run(5)

    @rule(n=st.integers(0, 3), with_jobs=st.booleans())
    def lose_host(self, n: int, with_jobs: bool) -> None:
        host = list(self.simulation.hosts.values())[n]
        if host.reachable:
            self.simulation.lose_host(host, with_jobs=with_jobs)

    @rule(n=st.integers(0, 3))
    def return_host(self, n: int) -> None:
        self.simulation.return_host(list(self.simulation.hosts.values())[n])

    @rule(n=st.integers(0, 3))
    def drain_host(self, n: int) -> None:
        host = list(self.simulation.hosts.values())[n]
        if host.reachable:
            self.simulation.drain(host, draining=True)

    @precondition(lambda self: len(self.simulation.hosts) < 6)
    @rule()
    def add_host(self) -> None:
        host = SimHost(HostID(f"h{len(self.simulation.hosts)}"))
        self.simulation.hosts[host.id] = host
        self.simulation.return_host(host)

    @rule(web=st.integers(0, 9), worker=st.integers(0, 5))
    def scale(self, web: int, worker: int) -> None:
        self.simulation.scale("shop", {"web": web, "worker": worker, "agent": 1, "db": 1})

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        running = [(host, job.id) for host in self.simulation.hosts.values() for job in host.active()]
        if running:
            host, id = data.draw(st.sampled_from(running))
            self.simulation.end_job(host, id)

    @rule(n=st.integers(0, 1))
    def lead(self, n: int) -> None:
        self.simulation.lead(n)

    @rule(seconds=st.sampled_from([0.1, 1, 6, 40]))
    def wait(self, seconds: float) -> None:
        self.simulation.run(seconds)

    def teardown(self) -> None:
        simulation = self.simulation
        simulation.clear_up()
        simulation.run(600)
        simulation.check()
        for type in ("web", "worker"):
            assert max(load(simulation, type)) - min(load(simulation, type)) <= 1
        for engine in simulation.engines:
            moved = Counter(job.type for job in engine.world.jobs.values() if job.reason.startswith("moved to"))
            assert set(moved) <= {"web", "worker"}
        starts = simulation.starts
        simulation.run(900)
        assert simulation.starts == starts, "no job goes back and forth"


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
