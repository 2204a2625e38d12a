"""Who is overdue, as a table: instances a and b of one service, registered with indexes 1 and 2."""

from __future__ import annotations

import pytest

from flynn.discoverd.expiry import overdue, remembered
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


@pytest.mark.parametrize(
    ("heard", "leading_since", "now", "gone"),
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
def test_overdue(heard: dict[str, float], leading_since: float, now: float, gone: str) -> None:
    keys = {("web", name): at for name, at in heard.items()}
    found = overdue(STATE, keys, leading_since, now)
    assert found == [Expired("web", name, {"a": 1, "b": 2}[name]) for name in gone]


def test_heartbeats_of_the_departed_are_forgotten() -> None:
    heard = {("web", "a"): 1.0, ("web", "z"): 1.0, ("gone", "a"): 1.0}
    assert remembered(STATE, heard) == {("web", "a"): 1.0}
