"""A new leader and the controller's books, which may be late: the database may have gone with the leader before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random

from flynn.scheduler.engine import BOOKS_PATIENCE, Engine
from flynn.scheduler.events import (
    Event,
    FormationReceived,
    FormationsListed,
    HostSeen,
    JobsListed,
    LeadershipChanged,
    RecordsListed,
    StartJob,
    Tick,
    VolumesRecorded,
)
from flynn.scheduler.model import Formation, HostID
from flynn.types.app import App
from flynn.types.release import ProcessType, Release

NODE = HostID("node1")
START = datetime(2024, 5, 1, tzinfo=UTC)
WANTED = Formation(
    app=App(id="a", name="shop"), release=Release(id="r", processes={"worker": ProcessType()}), wanted={"worker": 2}
)


def leader_of_a_known_cluster() -> Engine:
    """It has just been elected; hosts and streams have spoken, the controller does not answer its questions."""
    ids = count(1)
    engine = Engine(Random(1), lambda: f"{next(ids):08d}-0000-4000-8000-000000000000")
    engine.step([HostSeen(NODE, {}), FormationReceived(WANTED), VolumesRecorded()], START)
    engine.step([LeadershipChanged(True), JobsListed(NODE, (), START)], START)
    return engine


def starts(engine: Engine, now: datetime, *events: Event) -> int:
    return sum(isinstance(action, StartJob) for action in engine.step(events, now))


def test_books_that_do_not_come_are_waited_for_a_moment_only() -> None:
    engine = leader_of_a_known_cluster()
    assert starts(engine, START + BOOKS_PATIENCE - timedelta(milliseconds=1), Tick()) == 0
    due = engine.next_due()
    assert due is not None and due <= START + BOOKS_PATIENCE
    assert starts(engine, START + BOOKS_PATIENCE, Tick()) == 2
    later = START + 2 * BOOKS_PATIENCE
    assert starts(engine, later, FormationsListed((WANTED,), later), RecordsListed((), later)) == 0


def test_with_the_books_there_it_acts_at_once() -> None:
    engine = leader_of_a_known_cluster()
    assert starts(engine, START, FormationsListed((WANTED,), START), RecordsListed((), START)) == 2
