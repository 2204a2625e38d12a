"""Who is overdue, as a table: instances a and b of one service, registered with indexes 1 and 2."""

from __future__ import annotations

import pytest

from flynn.discoverd.expiry import Heartbeats
from flynn.discoverd.store import Directory, Expired, Service
from flynn.types.instance import Instance

STATE = Directory(
    index=2,
    services={
        "web": Service(
            instances={
                name: Instance(id=name, addr=f"{name}:1", proto="tcp", index=i) for i, name in ((1, "a"), (2, "b"))
            }
        )
    },
)


def leading(since: float, **heard: float) -> Heartbeats:
    heartbeats = Heartbeats()
    heartbeats.lead(since)
    for name, at in heard.items():
        heartbeats.hear(("web", name), at)
    return heartbeats


@pytest.mark.parametrize(
    ("heard", "since", "now", "gone"),
    [
        pytest.param({"a": 100, "b": 104}, 0, 105, "", id="both report"),
        pytest.param({"a": 100, "b": 104}, 0, 110, "", id="exactly the time to live is not yet too long"),
        pytest.param({"a": 100, "b": 104}, 0, 110.1, "a", id="one is silent"),
        pytest.param({"a": 100, "b": 104}, 0, 120, "ab", id="both are"),
        pytest.param({}, 100, 107.5, "", id="a new leader has heard nobody, and waits"),
        pytest.param({"b": 107}, 100, 107.6, "a", id="and then takes down who has not reported to it"),
        pytest.param({"a": 50}, 100, 107, "", id="what was heard before does not count against anybody"),
        pytest.param({"a": 100.1, "b": 107}, 100, 110, "", id="who has reported once has the whole time"),
    ],
)
def test_overdue(heard: dict[str, float], since: float, now: float, gone: str) -> None:
    found = leading(since, **heard).overdue(STATE, now)
    assert found == [Expired("web", name, {"a": 1, "b": 2}[name]) for name in gone]


def test_who_does_not_lead_takes_nobody_down() -> None:
    heartbeats = leading(0)
    heartbeats.cease()
    assert heartbeats.overdue(STATE, 1000) == []


@pytest.mark.parametrize(
    ("looks", "gone_at_last"),
    [
        pytest.param([0.5, 1.0, 1.5], "", id="looks in their usual rhythm change nothing"),
        pytest.param([0.5, 3600.5], "", id="an hour that passed between two looks was ours, not theirs"),
        pytest.param([0.5, -3599.5], "", id="a clock turned back by an hour"),
        pytest.param(
            [0.5, -3599.5, *(-3599.5 + n / 2 for n in range(22))], "ab", id="which delays the dead by seconds"
        ),
        pytest.param([0.5, *(3600 + n / 2 for n in range(22))], "ab", id="as does one put forward"),
    ],
)
def test_a_clock_that_jumps_takes_nobody_down_and_keeps_nobody_alive(looks: list[float], gone_at_last: str) -> None:
    heartbeats = leading(0, a=0.1, b=0.1)
    for now in looks:
        heartbeats.interrupted(now)
    assert [one.instance_id for one in heartbeats.overdue(STATE, looks[-1])] == list(gone_at_last)


def test_heartbeats_of_the_departed_are_forgotten() -> None:
    heartbeats = leading(0, a=1.0, z=1.0)
    heartbeats.hear(("gone", "a"), 1.0)
    heartbeats.overdue(STATE, 2)
    assert ("web", "z") in heartbeats.heard, "who has just been heard may be about to be registered"
    heartbeats.overdue(STATE, 12)
    assert heartbeats.heard == {("web", "a"): 1.0}
