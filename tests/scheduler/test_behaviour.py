"""What the original's tests ask of a scheduler, one behaviour each, on virtual time."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from flynn.scheduler.engine import Engine
from flynn.scheduler.events import FormationReceived, HostSeen, JobReport, JobsListed, PersistJob, RecordsListed
from flynn.scheduler.figures import COUNTED, exposition
from flynn.scheduler.model import Formation, HostID, JobID, JobState
from flynn.types.app import App
from flynn.types.host import JobStatus
from flynn.types.release import Release
from tests.scheduler.test_simulation import START, SimHost, Simulation, calm


def ready(hosts: int = 2) -> Simulation:
    simulation = calm(hosts)
    simulation.run(2)
    return simulation


def running(simulation: Simulation, type: str) -> list[int]:
    return [sum(1 for job in host.active() if job.type == type) for host in simulation.hosts.values()]


def first(simulation: Simulation) -> SimHost:
    return next(iter(simulation.hosts.values()))


def by_hand(host: SimHost, id: str, type: str = "worker", app: str = "shop") -> JobReport:
    return JobReport(
        host=host.id,
        id=JobID(id),
        app=app,
        release="rel",
        type=type,
        in_formation=True,
        status=JobStatus.RUNNING,
        created_at=START,
        started_at=START,
    )


def test_one_formation_starts_one_job_of_its_app_release_and_type() -> None:
    simulation = ready(1)
    simulation.scale("shop", {"worker": 1})
    simulation.run(1)
    (job,) = first(simulation).active()
    assert (job.app, job.release, job.type, job.host) == ("shop", "rel", "worker", "h0")


def test_up_by_three_down_by_three_and_a_second_release_is_a_formation_of_its_own() -> None:
    simulation = ready(1)
    for wanted in (1, 4, 1):
        simulation.scale("shop", {"worker": wanted})
        simulation.run(1)
        assert running(simulation, "worker") == [wanted]
    release = Release(id="r2", processes={"worker": simulation.formations["shop"].release.processes["worker"]})
    simulation.tell(FormationReceived(Formation(App(id="shop"), release, wanted={"worker": 2})))
    simulation.run(1)
    assert sorted(job.release for job in first(simulation).active()) == ["r2", "r2", "rel"]


def test_a_job_that_somebody_adds_by_hand_is_stopped_and_no_other() -> None:
    simulation = ready(2)
    simulation.scale("shop", {"worker": 2})
    simulation.run(5)
    before = {job.id for host in simulation.hosts.values() for job in host.active()}
    host = first(simulation)
    added = replace(by_hand(host, "extra"), created_at=simulation.now, started_at=simulation.now)
    simulation.report(host, added)
    simulation.run(2)
    assert {job.id for host in simulation.hosts.values() for job in host.active()} == before


def test_a_job_whose_formation_is_not_known_is_left_alone_and_adopted_when_it_comes() -> None:
    simulation = ready(1)
    host = first(simulation)
    simulation.report(host, by_hand(host, "known-only-here", app="late"))
    simulation.run(120)
    assert [job.id for job in host.active()] == ["known-only-here"]
    simulation.scale("late", {"worker": 1})
    simulation.run(5)
    assert [job.id for job in host.active()] == ["known-only-here"]
    assert simulation.starts == 0


def test_an_omni_type_is_on_every_host_comes_to_new_ones_and_is_not_replaced_elsewhere() -> None:
    simulation = ready(2)
    simulation.scale("shop", {"agent": 1, "worker": 2})
    simulation.run(5)
    assert running(simulation, "agent") == [1, 1]
    third = SimHost(HostID("h2"))
    simulation.hosts[third.id] = third
    simulation.return_host(third)
    simulation.run(5)
    assert running(simulation, "agent") == [1, 1, 1]
    agent = next(job for job in third.active() if job.type == "agent")
    simulation.end_job(third, agent.id, JobStatus.CRASHED)
    simulation.run(5)
    assert running(simulation, "agent") == [1, 1, 1], "one that crashed comes back where it was"
    simulation.lose_host(first(simulation), with_jobs=True)
    simulation.run(30)
    assert running(simulation, "agent") == [0, 1, 1]
    assert sum(running(simulation, "worker")) == 2


def test_omni_jobs_that_have_met_on_one_host_part_again() -> None:
    simulation = ready(2)
    simulation.scale("shop", {"agent": 1})
    simulation.run(5)
    here, there = simulation.hosts.values()
    simulation.end_job(there, there.active()[0].id)
    simulation.report(here, by_hand(here, "second", "agent"))
    simulation.run(5)
    assert running(simulation, "agent") == [1, 1]


def test_a_host_that_refuses_is_left_for_another_one_and_a_start_that_took_effect_late_is_undone() -> None:
    simulation = ready(2)
    start_job = simulation.start_job
    refused: list[tuple[SimHost, JobID]] = []

    def refuse_once(n: int, job: object, volumes: object) -> None:
        if not refused:
            refused.append((simulation.hosts[job.host], job.id))  # type: ignore[attr-defined]
            simulation.hosts[job.host].reachable = False  # type: ignore[attr-defined]
            start_job(n, job, volumes)  # type: ignore[arg-type]
            simulation.hosts[job.host].reachable = True  # type: ignore[attr-defined]
        else:
            start_job(n, job, volumes)  # type: ignore[arg-type]

    simulation.start_job = refuse_once  # type: ignore[method-assign]
    simulation.scale("shop", {"worker": 1})
    simulation.run(5)
    ((slow, id),) = refused
    other = next(host for host in simulation.hosts.values() if host is not slow)
    assert [job.id for job in other.active()] == [id]
    simulation.report(slow, by_hand(slow, id))
    simulation.run(5)
    assert not slow.active()
    assert [job.id for job in other.active()] == [id]


def test_a_listing_tells_what_no_event_told() -> None:
    simulation = ready(1)
    host = first(simulation)
    simulation.scale("shop", {"worker": 2})
    simulation.run(2)
    ended, kept = host.active()
    host.jobs[ended.id] = replace(ended, status=JobStatus.CRASHED, ended_at=simulation.now, exit_status=1)
    simulation.sync(0)
    simulation.run(2)
    assert simulation.engines[0].world.jobs[ended.id].exit_status == 1
    assert len(host.active()) == 2 and kept.id in {job.id for job in host.active()}


def test_tags_that_go_park_the_jobs_and_bring_them_back_when_they_return() -> None:
    simulation = ready(2)
    here, _ = simulation.hosts.values()

    def tag(tags: dict[str, str]) -> None:
        for n in range(2):
            simulation.step(n, HostSeen(here.id, tags))

    tag({"disk": "ssd", "zone": "a"})
    simulation.scale("shop", {"worker": 2})
    simulation.run(2)
    wanted = {"worker": {"disk": "ssd"}}
    tagged = replace(simulation.formations["shop"], tags=wanted, updated_at=simulation.now)
    simulation.formations["shop"] = tagged
    simulation.tell(FormationReceived(tagged))
    simulation.run(5)
    assert running(simulation, "worker") == [2, 0]
    tag({"zone": "a"})  # one of two tags goes
    simulation.run(5)
    assert running(simulation, "worker") == [0, 0]
    blocked = [job for job in simulation.engines[0].world.jobs.values() if job.state is JobState.BLOCKED]
    assert [job.reason for job in blocked] == ["no hosts found matching job tags"] * 2
    tag({"disk": "ssd"})
    simulation.run(5)
    assert running(simulation, "worker") == [2, 0]


def test_a_one_off_job_is_mirrored_and_nothing_else() -> None:
    simulation = ready(1)
    host = first(simulation)
    run = replace(by_hand(host, "run", type=""), in_formation=False)
    simulation.report(host, run)
    simulation.run(5)
    assert simulation.books[JobID("run")].state == "up"
    simulation.end_job(host, JobID("run"), JobStatus.CRASHED)
    simulation.run(60)
    assert simulation.books[JobID("run")].state == "down"
    assert not host.active() and simulation.starts == 0


def test_the_controller_is_told_again_of_what_its_books_lack_but_for_what_is_on_its_way() -> None:
    simulation = ready(1)
    begun = simulation.now
    simulation.scale("shop", {"worker": 1})
    simulation.run(1)
    engine, (job,) = simulation.engines[0], first(simulation).active()
    simulation.report(first(simulation), job)
    simulation.run(1)

    def told(books: RecordsListed) -> list[JobState]:
        actions = engine.step([books], simulation.now)
        return [action.job.state for action in actions if isinstance(action, PersistJob)]

    now = simulation.now
    assert told(RecordsListed((), begun)) == [], "it was asked before it was told"
    assert told(RecordsListed((), now, frozenset((job.id,)))) == [], "it was asked while it was still to be told"
    assert told(RecordsListed((), now)) == [JobState.RUNNING], "that a host has just said the same again is no excuse"
    assert told(RecordsListed((), now)) == [], "once"


def test_jobs_that_ended_are_forgotten_after_a_while() -> None:
    simulation = ready(1)
    host = first(simulation)
    for _ in range(20):
        simulation.scale("shop", {"worker": 3})
        simulation.run(5)
        simulation.scale("shop", {"worker": 0})
        simulation.run(5)
    engine = simulation.engines[0]
    assert len(engine.world.jobs) == 60
    host.jobs.clear()  # the host forgets them too
    simulation.run(12 * 60)
    assert not engine.world.jobs
    assert not simulation.engines[1].world.jobs, "the one that does not lead as well"


def test_figures() -> None:
    simulation = ready(1)
    simulation.scale("shop", {"worker": 3})
    simulation.run(2)
    told = exposition(simulation.engines[0], queued=4, untold=5).splitlines()
    for line in (
        "flynn_scheduler_leads 1",
        "flynn_scheduler_events_queued 4",
        "flynn_scheduler_updates_untold 5",
        'flynn_scheduler_hosts{state="healthy"} 1',
        'flynn_scheduler_jobs{state="running"} 3',
        "flynn_scheduler_starts_total 3",
        "flynn_scheduler_ups_total 3",
    ):
        assert line in told
    assert set(simulation.engines[0].counts) <= set(COUNTED)


def test_a_listing_of_a_host_that_was_given_up_changes_nothing() -> None:
    engine = Engine(Random(1), lambda: "u1")
    assert engine.step([JobsListed(HostID("gone"), (by_hand(SimHost(HostID("gone")), "x"),), START)], START) == []
    assert not engine.world.jobs
