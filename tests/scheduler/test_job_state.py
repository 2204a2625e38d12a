"""What one job does on every event in every state."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from pytest import param

from flynn.scheduler.job_state import (
    MOVES,
    Event,
    HostEnded,
    HostRunning,
    HostStarting,
    Lost,
    NoPlace,
    Persist,
    Placed,
    Ready,
    StartFailed,
    StopOnHost,
    StopWanted,
    Unblocked,
    advance,
)
from flynn.scheduler.model import HostID, Job, JobID, JobState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=10)
H1, H2 = HostID("h1"), HostID("h2")

EVENTS: list[Event] = [
    Placed(H1, (), NOW),
    NoPlace("no hosts"),
    Unblocked(),
    StartFailed(H1, "no", NOW),
    HostStarting(H1, NOW),
    HostStarting(H2, NOW),
    HostRunning(H1, NOW, True, NOW),
    HostRunning(H1, NOW, False, NOW),
    HostRunning(H2, NOW, True, NOW),
    HostEnded(H1, NOW, LATER, 0, None, LATER),
    HostEnded(H2, NOW, LATER, 1, "broken", LATER),
    Ready(),
    StopWanted("scaled down"),
    Lost("host gone", NOW),
]


def job(state: JobState = JobState.PENDING, host: HostID | None = H1, **fields: object) -> Job:
    made = Job(id=JobID("u1"), app="a", release="r", type="web", state=state, created_at=NOW, host=host)
    return replace(made, **fields)


@pytest.mark.parametrize(("state", "event"), list(product(JobState, EVENTS)))
def test_every_event_in_every_state_makes_a_legal_move_and_tells_of_it(state: JobState, event: Event) -> None:
    for host in (None, H1) if state in (JobState.PENDING, JobState.BLOCKED) else (H1,):
        before = job(state, host)
        after, actions = advance(before, event)
        if after.state is not before.state:
            assert after.state in MOVES[before.state]
            told = not isinstance(event, Unblocked)
            assert (Persist(after) in actions) is told
        assert advance(before, event) == (after, actions)  # nothing is remembered outside the job
        again, repeated = advance(after, event)
        assert again.state is after.state or isinstance(event, NoPlace | Unblocked | Placed)
        assert not any(isinstance(action, Persist) for action in repeated) or isinstance(event, Placed)


@pytest.mark.parametrize(
    ("before", "event", "state", "actions"),
    [
        param(job(host=None), StopWanted("x"), JobState.STOPPED, 1, id="a job that was never placed just ends"),
        param(job(), StopWanted("x"), JobState.STOPPING, 2, id="a placed one is stopped on its host"),
        param(job(run_at=NOW), StopWanted("x"), JobState.STOPPED, 1, id="one that waits for its next try just ends"),
        param(job(JobState.BLOCKED, None), StopWanted("x"), JobState.STOPPED, 1, id="a blocked job can be ended"),
        param(job(), HostRunning(H1, NOW, False, NOW), JobState.STARTING, 1, id="running without service is starting"),
        param(job(JobState.RUNNING), HostStarting(H1, NOW), JobState.RUNNING, 0, id="reports never move backwards"),
        param(job(JobState.STOPPING), HostRunning(H1, NOW, True, NOW), JobState.STOPPING, 0, id="a stop is final"),
        param(job(JobState.STOPPED), HostRunning(H1, NOW, True, NOW), JobState.RUNNING, 1, id="a lost job is revived"),
        param(
            job(JobState.STOPPED, ended_at=LATER),
            HostRunning(H1, NOW, True, NOW),
            JobState.STOPPED,
            0,
            id="an ended job is not revived by an old report",
        ),
        param(
            job(JobState.STOPPED, ended_at=NOW),
            HostRunning(H1, LATER, True, LATER),
            JobState.RUNNING,
            1,
            id="a job that its host started again after a reboot is revived",
        ),
        param(
            job(JobState.RUNNING, started_at=LATER),
            HostEnded(H1, NOW, NOW, 1, None, LATER),
            JobState.RUNNING,
            0,
            id="the end of an earlier run does not end this one",
        ),
    ],
)
def test_moves(before: Job, event: Event, state: JobState, actions: int) -> None:
    after, asked = advance(before, event)
    assert (after.state, len(asked)) == (state, actions)


def test_a_job_that_shows_up_on_another_host_is_stopped_there_and_stays_where_it_is() -> None:
    before = job(JobState.RUNNING)
    assert advance(before, HostRunning(H2, NOW, True, NOW)) == (before, (StopOnHost(H2, before.id),))


def test_failed_starts_wait_longer_each_time_up_to_half_a_minute() -> None:
    current, waits = job(), []
    for _ in range(70):
        current, _ = advance(current, StartFailed(H1, "no", NOW))
        assert current.run_at is not None
        waits.append((current.run_at - NOW).total_seconds())
    assert waits[:3] == [0.5, 1.0, 1.5]
    assert max(waits) == waits[-1] == 30
