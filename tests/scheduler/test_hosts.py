"""When a host counts as lost: a daemon that restarts is not a machine that died."""

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from pytest import param

from flynn.scheduler.engine import Engine
from flynn.scheduler.events import (
    CheckHost,
    FollowHost,
    HostChecked,
    HostGone,
    HostSeen,
    ListingFailed,
    Tick,
    UnfollowHost,
)
from flynn.scheduler.hosts import CHECK_EVERY, FAILED_CHECKS, FAILED_CHECKS_LISTED
from flynn.scheduler.model import HostID

NODE = HostID("node1")
START = datetime(2024, 5, 1, tzinfo=UTC)


def test_however_often_a_host_is_suspected_it_is_probed_at_one_pace() -> None:
    engine = Engine(Random(1), lambda: "u1")
    engine.step([HostSeen(NODE, {})], START)
    now, probes = START, 0
    while now < START + 10 * CHECK_EVERY:
        for event in (ListingFailed(NODE), HostGone(NODE) if probes > 8 else Tick()):
            probes += engine.step([event], now).count(CheckHost(NODE))
        engine.step([HostChecked(NODE, False)], now)
        now += timedelta(milliseconds=50)
    assert probes <= 11


def failing_checks(engine: Engine, limit: int) -> int:
    """Let probes fail until the host is given up; how many it took (at most `limit`)."""
    now = START
    for count in range(1, limit + 1):
        now += CHECK_EVERY + timedelta(milliseconds=1)
        actions = engine.step([HostChecked(NODE, False)], now)
        if UnfollowHost(NODE) in actions:
            return count
        assert CheckHost(NODE) in actions, "the next one follows"
    return limit


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        param(
            ListingFailed(NODE), FAILED_CHECKS_LISTED, id="the directory still lists it: its daemon may be restarting"
        ),
        param(HostGone(NODE), FAILED_CHECKS, id="the directory has given it up as well"),
    ],
)
def test_the_patience_with_a_host_depends_on_the_directory(event: ListingFailed | HostGone, expected: int) -> None:
    engine = Engine(Random(1), lambda: "u1")
    engine.step([HostSeen(NODE, {})], START)
    assert CheckHost(NODE) in engine.step([event], START)
    assert failing_checks(engine, 100) == expected


def test_a_host_that_was_given_up_is_followed_anew_when_it_is_seen() -> None:
    engine = Engine(Random(1), lambda: "u1")
    engine.step([HostSeen(NODE, {})], START)
    engine.step([HostGone(NODE)], START)
    failing_checks(engine, 100)
    assert NODE not in engine.world.hosts
    assert FollowHost(NODE) in engine.step([HostSeen(NODE, {})], START)


def test_a_machine_that_does_not_even_refuse_is_given_up_as_soon_as_three_probes_have_had_their_time() -> None:
    engine = Engine(Random(1), lambda: "u1")
    engine.step([HostSeen(NODE, {})], START)
    actions, now = engine.step([HostGone(NODE)], START), START
    for _ in range(FAILED_CHECKS):
        assert CheckHost(NODE) in actions
        now += timedelta(seconds=1)
        actions = engine.step([HostChecked(NODE, False)], now)
    assert UnfollowHost(NODE) in actions


def test_a_host_whose_probes_have_failed_is_given_up_in_the_moment_in_which_the_directory_does_so() -> None:
    engine = Engine(Random(1), lambda: "u1")
    engine.step([HostSeen(NODE, {})], START)
    engine.step([ListingFailed(NODE)], START)
    now = START
    for _ in range(FAILED_CHECKS):
        now += timedelta(seconds=1)
        assert UnfollowHost(NODE) not in engine.step([HostChecked(NODE, False)], now)
    assert UnfollowHost(NODE) in engine.step([HostGone(NODE)], now)
    assert engine.step([HostChecked(NODE, False)], now + timedelta(seconds=1)) == [], "the last probe comes too late"
