"""How values look in a terminal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pytest import param

from flynn.cli import limits, output
from flynn.cli.commands.scale import announcement, pairs, parse
from flynn.cli.errors import CliError
from flynn.types.resources import Limit


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        param([["ID", "NAME"], ["1", "a longer name"]], "ID  NAME\n1   a longer name\n", id="no padding at the end"),
        param(
            [["NAME", "URL"], ["a", "http://x", "(default)"], ["b", "http://longer"]],
            "NAME  URL\na     http://x  (default)\nb     http://longer\n",
            id="a cell is as wide as neighbours that go on after it",
        ),
        param([["web:", ""], ["worker:", "cpu=1", "max_fd=2"]], "web:     \nworker:  cpu=1  max_fd=2\n", id="empty"),
        param([], "", id="nothing"),
    ],
)
def test_tables(rows: list[list[str]], text: str) -> None:
    assert output.table(rows) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(milliseconds=999), "Less than a second"),
        (timedelta(seconds=1), "1 seconds"),
        (timedelta(seconds=59.9), "59 seconds"),
        (timedelta(seconds=60), "About a minute"),
        (timedelta(minutes=59), "59 minutes"),
        (timedelta(minutes=60), "About an hour"),
        (timedelta(hours=47), "47 hours"),
        (timedelta(hours=48), "2 days"),
        (timedelta(days=13), "13 days"),
        (timedelta(days=14), "2 weeks"),
        (timedelta(days=90), "3 months"),
        (timedelta(days=730), "2 years"),
    ],
)
def test_ages(duration: timedelta, text: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert output.age(now - duration, now) == f"{text} ago"


def test_a_missing_time_has_no_age() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert output.age(None, now) == output.age(datetime(1, 1, 1, tzinfo=UTC), now) == ""
    assert output.moment(None) == "<nil>"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.304379602, "304.379602ms"),
        (3.944629056, "3.944629056s"),
        (62.5, "1m2.5s"),
        (120, "2m0s"),
        (3600, "1h0m0s"),
        (0.0000015, "1.5µs"),
        (0, "0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("microsecond", "text"),
    [
        (123456, "2020-01-02 03:04:05.123456 +0000 UTC"),
        (120000, "2020-01-02 03:04:05.12 +0000 UTC"),
        (0, "2020-01-02 03:04:05 +0000 UTC"),
    ],
)
def test_moments(microsecond: int, text: str) -> None:
    assert output.moment(datetime(2020, 1, 2, 3, 4, 5, microsecond, tzinfo=UTC)) == text


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        ("2020-01-02T03:04:05.123456789Z", "2020-01-02T03:04:05.123456Z"),
        ("2020-01-02T03:04:05Z", "2020-01-02T03:04:05.000000Z"),
        ("2020-01-02T03:04:05.5+02:00", "2020-01-02T03:04:05.500000+02:00"),
    ],
)
def test_times_of_log_lines(stamp: str, text: str) -> None:
    assert output.log_time(stamp) == text


@pytest.mark.parametrize(
    ("word", "limit", "shown"),
    [
        ("memory=512MB", 512 * 1024**2, "memory=512MB"),
        ("memory=1.5g", 3 * 1024**3 // 2, "memory=1.5GB"),
        ("max_fd=12k", 12000, "max_fd=12000"),
        ("cpu=500", 500, "cpu=500"),
        ("temp_disk=100 mb", 100 * 1024**2, "temp_disk=100MB"),
    ],
)
def test_limits(word: str, limit: int, shown: str) -> None:
    (name,) = parsed = limits.parse([word])
    assert parsed[name] == Limit(limit=limit)
    assert limits.shown(name, parsed[name]) == shown


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("memory", 'invalid resource limit: "memory"'),
        ("max_procs=1", 'invalid resource limit type: ["max_procs" "1"]'),
        ("memory=lots", 'invalid resource limit value: "lots"'),
        ("memory=1.2.3", 'invalid resource limit value: "1.2.3"'),
    ],
)
def test_refused_limits(word: str, message: str) -> None:
    with pytest.raises(CliError) as refusal:
        limits.parse([word])
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["web"], "ERROR: scale args must be of the form <typ>=<spec>"),
        (["web=many"], 'ERROR: could not parse quantity in "web=many"'),
        (["web=-1"], 'ERROR: process quantities cannot be negative in "web=-1"'),
        (["a=1", "web=1", "b=1"], 'ERROR: unknown process types: "a", "b"'),
    ],
)
def test_refused_scale_arguments(words: list[str], message: str) -> None:
    with pytest.raises(CliError) as refusal:
        parse(words, ["web"])
    assert str(refusal.value) == message


def test_scale_arguments_with_tags() -> None:
    spec = parse(["web=2,ssd,zone=a", "clock=0"], ["web", "clock"])
    assert spec.processes == {"web": 2, "clock": 0}
    assert spec.tags == {"web": {"ssd": "true", "zone": "a"}}


def test_what_a_scale_says() -> None:
    assert announcement({"web": 2}, {"worker": 1, "web": 3, "clock": 0}) == "scaling web: 2=>3, worker: 0=>1"
    assert announcement({"web": 2}, {"web": 2}) == "scaling "
    assert pairs({"web": 0, "clock": 1}) == "clock=1 web=0"
