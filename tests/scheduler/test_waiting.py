"""Jobs that wait: after too many ends, for a host that fits, for their service. And what is told of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytest import param

from flynn.scheduler.events import FormationReceived, HostDescribed, HostSeen, PersistJob, ServiceListed
from flynn.scheduler.model import Formation, HostID, JobState
from flynn.types.app import SYSTEM_CRITICAL, App
from flynn.types.host import JobStatus
from flynn.types.release import Port, ProcessType, Release
from flynn.types.resources import Limit
from tests.scheduler.test_simulation import Simulation, calm


def ready(hosts: int) -> Simulation:
    """A leader that has listed everything."""
    simulation = calm(hosts)
    simulation.run(2)
    return simulation


def crash(simulation: Simulation, type: str = "worker") -> None:
    host, job = next((host, job) for host in simulation.hosts.values() for job in host.active() if job.type == type)
    simulation.end_job(host, job.id, JobStatus.CRASHED)


def crash_looping() -> Simulation:
    """A job that has ended six times: the next one waits."""
    simulation = ready(2)
    simulation.scale("shop", {"worker": 1})
    simulation.run(1)
    for _ in range(6):
        crash(simulation)
        simulation.run(1)
    assert not any(host.active() for host in simulation.hosts.values())
    return simulation


def test_the_first_restarts_come_at_once_and_then_they_wait_and_say_so() -> None:
    simulation = crash_looping()
    (waiting,) = [job for job in simulation.engines[0].world.jobs.values() if job.state is JobState.PENDING]
    assert (waiting.restarts, waiting.reason) == (6, "has ended 6 times, starts again later")
    simulation.run(8)
    assert not any(host.active() for host in simulation.hosts.values())
    simulation.run(2)
    assert sum(len(host.active()) for host in simulation.hosts.values()) == 1


@pytest.mark.parametrize(
    "moment",
    [
        param("waiting", id="while it waits"),
        param("running", id="while it runs, and it ends under the next one"),
        param("between", id="while it runs, and it ends while nobody leads"),
    ],
)
def test_a_crash_loop_stays_one_under_the_next_leader(moment: str) -> None:
    simulation = crash_looping()
    if moment != "waiting":
        simulation.run(10)
    fresh = type(simulation.engines[0])(simulation.random, simulation.new_id)
    if moment == "between":
        simulation.engines[0] = type(simulation.engines[0])(simulation.random, simulation.new_id)
        crash(simulation)
        simulation.run(1)
    simulation.engines[1] = fresh  # it has not seen any of this
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.tell(FormationReceived(simulation.formations["shop"]))
    simulation.run(1)
    simulation.leader = None if moment == "between" else simulation.leader
    simulation.lead(1)
    simulation.run(1)
    if moment == "running":
        crash(simulation)
        simulation.run(1)
    assert not any(host.active() for host in simulation.hosts.values()), "it waits"
    simulation.run(12)
    (job,) = [job for job in fresh.world.jobs.values() if job.state is JobState.RUNNING]
    assert job.restarts == (6 if moment == "waiting" else 7)


def test_a_blocked_job_says_why_once_and_starts_when_a_host_fits() -> None:
    simulation = ready(2)
    told: list[tuple[str, str]] = []
    perform = simulation.perform

    def listen(n: int, action: object) -> None:
        if isinstance(action, PersistJob):
            told.append((action.job.state.value, action.job.reason))
        perform(n, action)  # type: ignore[arg-type]

    simulation.perform = listen  # type: ignore[method-assign]
    simulation.scale("shop", {"worker": 1})
    tagged = replace(simulation.formations["shop"], tags={"worker": {"disk": "ssd"}}, updated_at=simulation.now)
    simulation.formations["shop"] = tagged
    simulation.agenda.clear()
    simulation.tell(FormationReceived(tagged))
    simulation.run(1)
    assert told == [("blocked", "no hosts found matching job tags")]
    for _ in range(10):
        simulation.sync(0)
        simulation.run(30)
    assert len(told) == 1, "listings change nothing, so nothing is tried or told again"
    simulation.step(0, HostSeen(HostID("h0"), {"disk": "hdd"}))
    assert len(told) == 1, "nor does a host that does not fit either"
    simulation.step(0, HostSeen(HostID("h0"), {"disk": "ssd"}))
    simulation.run(1)
    assert [state for state, _ in told[1:]] == ["pending", "starting", "running"]
    assert [job.type for job in simulation.hosts[HostID("h0")].active()] == ["worker"]


def test_a_blocked_job_that_is_not_wanted_any_more_is_gone() -> None:
    simulation = ready(2)
    simulation.scale("shop", {"worker": 1})
    simulation.agenda.clear()
    tagged = replace(simulation.formations["shop"], tags={"worker": {"disk": "ssd"}})
    simulation.tell(FormationReceived(tagged))
    simulation.run(1)
    simulation.tell(FormationReceived(replace(tagged, wanted={}, updated_at=simulation.now)))
    simulation.run(1)
    simulation.step(0, HostSeen(HostID("h0"), {"disk": "ssd"}))
    simulation.run(5)
    assert simulation.starts == 0


def unheard(critical: bool) -> Simulation:
    """A job whose service never lists it."""
    simulation = ready(1)
    simulation.serve = lambda host, id: None  # type: ignore[method-assign]
    app = App(id="shop", name="shop", deploy_timeout=60, meta={SYSTEM_CRITICAL: "true"} if critical else {})
    simulation.scale("shop", {"web": 1})
    simulation.agenda.clear()
    simulation.formations["shop"] = replace(simulation.formations["shop"], app=app)
    simulation.tell(FormationReceived(simulation.formations["shop"]))
    simulation.step(0, ServiceListed("shop-web", frozenset()))
    simulation.run(1)
    return simulation


def test_a_job_that_never_comes_into_service_is_replaced_after_the_time_its_app_allows() -> None:
    simulation = unheard(critical=False)
    (host,) = simulation.hosts.values()
    (first,) = host.active()
    simulation.run(85)
    assert [job.id for job in host.active()] == [first.id]
    simulation.run(10)
    (second,) = host.active()
    assert second.id != first.id
    world = simulation.engines[0].world
    assert world.jobs[first.id].reason == "not in service after 90 s"
    assert world.jobs[second.id].restarts == 1
    simulation.run(90 * 10)
    assert max(job.restarts for job in world.jobs.values()) >= 7, "and again, later each time"


def test_a_job_in_service_is_not_touched_nor_is_one_of_the_platforms_base() -> None:
    simulation = unheard(critical=True)
    (host,) = simulation.hosts.values()
    (first,) = host.active()
    simulation.run(3600)
    assert [job.id for job in host.active()] == [first.id]
    served = ready(1)
    served.scale("shop", {"web": 1})
    served.run(3600)
    assert served.starts == 1


def test_while_the_directory_has_not_said_whom_a_service_lists_nobody_is_late() -> None:
    simulation = ready(1)
    simulation.serve = lambda host, id: None  # type: ignore[method-assign]
    simulation.scale("shop", {"web": 1})
    simulation.run(3600)
    assert simulation.starts == 1


def test_why_a_host_does_not_take_a_job_is_told() -> None:
    simulation = ready(1)
    (host,) = simulation.hosts.values()
    host.reachable = False
    simulation.scale("shop", {"worker": 1})
    simulation.run(1)
    (job,) = simulation.engines[0].world.jobs.values()
    assert (job.state, job.reason) == (JobState.PENDING, "h0 did not take it: refused")
    host.reachable = True
    simulation.run(5)
    (job,) = simulation.engines[0].world.jobs.values()
    assert (job.state, job.reason) == (JobState.RUNNING, "")


def on_port(app: str, number: int, wanted: int) -> Formation:
    process = ProcessType(host_network=True, ports=[Port(port=number, proto="tcp")])
    return Formation(App(id=app, name=app), Release(id=f"r-{app}", processes={"web": process}), wanted={"web": wanted})


def test_two_apps_that_want_the_same_port_of_the_host_wait_for_each_other() -> None:
    simulation = ready(2)
    simulation.tell(FormationReceived(on_port("one", 8000, 2)))
    simulation.run(1)
    assert [len(host.active()) for host in simulation.hosts.values()] == [1, 1]
    simulation.tell(FormationReceived(on_port("other", 8000, 1)))
    simulation.tell(FormationReceived(on_port("third", 9000, 1)))
    simulation.run(1)
    assert sum(len(host.active()) for host in simulation.hosts.values()) == 3
    (blocked,) = [job for job in simulation.engines[0].world.jobs.values() if job.state is JobState.BLOCKED]
    assert (blocked.app, blocked.reason) == ("other", "on every host that fits a job has port 8000/tcp")
    simulation.tell(FormationReceived(replace(on_port("one", 8000, 1), updated_at=simulation.now)))
    simulation.run(2)
    apps = sorted(job.app for host in simulation.hosts.values() for job in host.active())
    assert apps == ["one", "other", "third"]


def test_many_small_apps_fill_the_hosts_evenly() -> None:
    simulation = ready(3)
    for host in simulation.hosts:
        simulation.step(0, HostDescribed(host, 64 * 2**30))
    release = Release(id="rel", processes={"web": ProcessType(resources={"memory": Limit(request=2**30)})})
    for n in range(60):
        simulation.tell(FormationReceived(Formation(App(id=f"a{n}"), release, wanted={"web": 1})))
        simulation.run(0.2)
    assert [len(host.active()) for host in simulation.hosts.values()] == [20, 20, 20]
    assert set(simulation.engines[0].world.reserved.values()) == {20 * 2**30}
