"""Formations against jobs, and the taking in of formations."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from pytest import param

from flynn.scheduler.formations import Accepted, Stale, accept
from flynn.scheduler.model import Formation, Host, HostID, Job, JobID, JobState
from flynn.scheduler.reconcile import CompleteScale, Create, Stop, choose_to_stop, reconcile
from flynn.scheduler.restarts import restart_of
from flynn.types.app import App
from flynn.types.formation import ScaleRequest
from flynn.types.release import ProcessType, Release

NOW = datetime(2026, 1, 1, tzinfo=UTC)
H1, H2 = Host(HostID("h1")), Host(HostID("h2"), {"disk": "ssd"})
HOSTS = {host.id: host for host in (H1, H2)}
P, B, S, R, X, D = (
    JobState.PENDING,
    JobState.BLOCKED,
    JobState.STARTING,
    JobState.RUNNING,
    JobState.STOPPING,
    JobState.STOPPED,
)


def formation(wanted: dict[str, int], **changes: object) -> Formation:
    release = Release(id="r", processes={"web": ProcessType(), "agent": ProcessType(omni=True), "clock": ProcessType()})
    return replace(Formation(app=App(id="a", name="shop"), release=release, wanted=wanted), **changes)


def job(id: str, state: JobState, type: str = "web", host: str = "h1", age: int = 0) -> Job:
    """`age` in seconds: a greater one is older."""
    placed = None if state in (P, B) else HostID(host)
    return Job(JobID(id), "a", "r", type, state, NOW - timedelta(seconds=age), host=placed)


@pytest.mark.parametrize(
    ("wanted", "jobs", "decisions"),
    [
        param({"web": 1}, [], [Create("web", 1)], id="a missing job is created"),
        param({"web": 3}, [job("1", R)], [Create("web", 2)], id="as many as are missing"),
        param({"web": 2}, [job("1", P), job("2", B)], [], id="pending and blocked jobs count"),
        param({"web": 1}, [job("1", X)], [Create("web", 1)], id="a stopping job does not count"),
        param({"web": 1}, [job("1", D)], [Create("web", 1)], id="nor a stopped one"),
        param({}, [job("1", R)], [Stop(JobID("1"), "scaled down")], id="a type that is not wanted goes"),
        param({"web": 0, "": 5}, [], [], id="the empty type means nothing"),
        param({"agent": 1}, [], [Create("agent", 2)], id="an omni type is wanted on every host"),
        param(
            {"agent": 1},
            [job("old", R, "agent", age=9), job("new", R, "agent")],
            [Create("agent", 1), Stop(JobID("new"), "more than its share on this host")],
            id="two of an omni type on one host are spread out again",
        ),
        param(
            {"agent": 1}, [job("1", R, "agent"), job("2", S, "agent", "h2")], [], id="one of an omni type on each host"
        ),
    ],
)
def test_decisions(wanted: dict[str, int], jobs: list[Job], decisions: list[object]) -> None:
    assert reconcile(formation(wanted), jobs, HOSTS) == decisions


def test_jobs_on_hosts_without_the_tags_move() -> None:
    tagged = formation({"web": 2}, tags={"web": {"disk": "ssd"}})
    jobs = [job("1", R, host="h1"), job("2", R, host="h2")]
    assert reconcile(tagged, jobs, HOSTS) == [Create("web", 1), Stop(JobID("1"), "host tags do not match")]


def test_omni_types_are_wanted_only_where_their_tags_fit() -> None:
    assert formation({"agent": 2}, tags={"agent": {"disk": "ssd"}}).targets([H1, H2]) == {"agent": 2}


def test_omni_types_come_back_after_a_moment_without_hosts() -> None:
    assert formation({"agent": 1}).targets([]) == {"agent": 0}
    assert formation({"agent": 1}).targets([replace(H1, shutting_down=True), H2]) == {"agent": 1}


def test_one_offs_are_nobodys_business() -> None:
    assert reconcile(formation({}), [replace(job("1", R), in_formation=False)], HOSTS) == []


@pytest.mark.parametrize(
    ("jobs", "order"),
    [
        param([job("r", R), job("s", S), job("p", P), job("b", B)], "pbsr", id="not yet running ones first"),
        param([job("old", R, age=5), job("new", R)], "new old", id="the newest first"),
        param([job("new", R), job("leaving", R, host="h3", age=9)], "leaving new", id="jobs on leaving hosts first"),
        param([job("x", X), job("d", D), job("r", R)], "r", id="those that are ending anyway are not chosen"),
    ],
)
def test_choice_of_jobs_to_stop(jobs: list[Job], order: str) -> None:
    hosts = {**HOSTS, HostID("h3"): Host(HostID("h3"), shutting_down=True)}
    chosen = [j.id for j in choose_to_stop(jobs, 9, hosts)]
    assert chosen == (order.split() if " " in order else list(order))


@pytest.mark.parametrize(
    ("wanted", "jobs", "complete"),
    [
        param({"web": 1}, [job("1", R)], True, id="all jobs run"),
        param({"web": 1}, [job("1", S)], False, id="one is still starting"),
        param({"web": 0}, [job("1", X)], True, id="those on their way out count as gone"),
        param({"web": 1}, [job("1", R), job("2", R)], False, id="one too many"),
        param({"agent": 1}, [job("1", R, "agent")], False, id="an omni type misses a host"),
    ],
)
def test_completion_of_scale_requests(wanted: dict[str, int], jobs: list[Job], complete: bool) -> None:
    request = ScaleRequest(id="s", state="pending")
    decisions = reconcile(formation(wanted, scale_request=request), jobs, HOSTS)
    assert (CompleteScale(request) in decisions) is complete


def test_an_older_formation_is_ignored() -> None:
    before, after = formation({"web": 1}, updated_at=NOW), formation({"web": 2}, updated_at=NOW - timedelta(seconds=1))
    assert isinstance(accept(before, after), Stale)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        param(formation({"web": 1}), formation({"web": 1, "clock": 0}), False, id="absent is zero"),
        param(formation({"web": 1}), formation({"web": 2}), True, id="counts"),
        param(
            formation({"web": 1}, tags={"web": {"a": "1", "b": "2"}}),
            formation({"web": 1}, tags={"web": {"a": "1"}}),
            True,
            id="a tag was taken away",
        ),
    ],
)
def test_what_is_a_change(before: Formation, after: Formation, changed: bool) -> None:
    verdict = accept(before, after)
    assert isinstance(verdict, Accepted)
    assert verdict.changed is changed


@pytest.mark.parametrize(
    ("restarts", "lived", "expected"),
    [
        param(0, 1, (1, 0), id="the first restart is at once"),
        param(4, 1, (5, 0), id="so is the fifth"),
        param(5, 1, (6, 10), id="then it takes ten seconds"),
        param(15, 1, (16, 30), id="and in the end thirty"),
        param(15, 301, (1, 0), id="who lived for five minutes begins anew"),
        param(7, None, (8, 10), id="who never started does not"),
    ],
)
def test_restarts(restarts: int, lived: int | None, expected: tuple[int, int]) -> None:
    started = None if lived is None else NOW - timedelta(seconds=lived)
    restart = restart_of(replace(job("1", D), restarts=restarts, started_at=started), NOW)
    assert (restart.restarts, restart.delay.total_seconds()) == expected
