"""What a watcher is told across broken connections: differences, and nothing twice."""

from __future__ import annotations

import pytest

from flynn.discoverd.view import Replay, leaders
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, ServiceMeta


def event(text: str) -> DiscoverdEvent:
    """`up a 3` (instance a, index 3), `update a 3 x` (with metadata), `leader a`, `leader -`, `meta 1`, `current`."""
    kind, *rest = text.split()
    if kind == "meta":
        meta = ServiceMeta(data=rest[0], index=int(rest[0]))
        return DiscoverdEvent(service="s", kind=EventKind.SERVICE_META, service_meta=meta)
    instance = None
    if rest and rest[0] != "-":
        index = int(rest[1]) if len(rest) > 1 else 1
        meta_ = {"m": rest[2]} if len(rest) > 2 else {}
        instance = Instance(id=rest[0], addr=f"{rest[0]}:1", proto="tcp", index=index, meta=meta_)
    return DiscoverdEvent(service="s", kind=EventKind(kind), instance=instance)


def text(event: DiscoverdEvent) -> str:
    if event.kind is EventKind.SERVICE_META:
        assert event.service_meta is not None
        return f"meta {event.service_meta.data}"
    if event.kind is EventKind.LEADER:
        return f"leader {event.instance.id if event.instance else '-'}"
    if event.instance is None:
        return str(event.kind)
    return " ".join([event.kind, event.instance.id, str(event.instance.index), *event.instance.meta.values()])


@pytest.mark.parametrize(
    ("fed", "told"),
    [
        pytest.param(
            "up a 1, up b 2, leader a, meta 5, current", "up a 1, up b 2, leader a, meta 5, current", id="first"
        ),
        pytest.param("up a 1", "", id="nothing before the replay is complete"),
        pytest.param(
            "current, up a 1, leader a, down a 1, leader -", "current, up a 1, leader a, down a 1, leader -", id="live"
        ),
        pytest.param(
            "up a 1, leader a, meta 3, current, cut, up a 1, leader a, meta 3, current",
            "up a 1, leader a, meta 3, current",
            id="a reconnect without news says nothing, current included",
        ),
        pytest.param(
            "up a 1, up b 2, leader a, current, cut, up b 2, leader b, current",
            "up a 1, up b 2, leader a, current, down a 1, leader b",
            id="who vanished is taken down",
        ),
        pytest.param(
            "up a 1, leader a, current, cut, current",
            "up a 1, leader a, current, down a 1, leader -",
            id="all vanished",
        ),
        pytest.param(
            "up a 1, current, cut, up a 1 new, up c 9, current",
            "up a 1, current, update a 1 new, up c 9",
            id="changes and arrivals",
        ),
        pytest.param(
            "up a 1, current, cut, up a 7, current", "up a 1, current, update a 7", id="registered anew meanwhile"
        ),
        pytest.param(
            "up a 1, current, cut, up b 2, cut, up a 1, current",
            "up a 1, current",
            id="a connection that breaks in mid-replay leaves no trace",
        ),
        pytest.param(
            "meta 1, current, cut, meta 2, current", "meta 1, current, meta 2", id="metadata changed meanwhile"
        ),
        pytest.param(
            "up a 1, leader a, current, leader a", "up a 1, leader a, current", id="a repeated leader is hidden"
        ),
    ],
)
def test_replay(fed: str, told: str) -> None:
    replay, heard = Replay("s"), []
    for item in fed.split(", "):
        if item == "cut":
            replay.disconnected()
        else:
            heard += [text(news) for news in replay.feed(event(item))]
    assert ", ".join(heard) == told


async def test_leaders_begin_with_who_it_is_now() -> None:
    async def events():  # type: ignore[no-untyped-def]
        for item in ["up a 1", "leader a", "current", "leader b", "leader -"]:
            yield event(item)

    assert [leader and leader.id async for leader in leaders(events())] == ["a", "b", None]
