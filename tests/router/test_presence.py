"""What a router announces to the scheduler."""

from __future__ import annotations

from flynn.router.client import RouterEvent
from flynn.router.presence import Presence
from flynn.types.instance import Instance
from flynn.types.route import Route

ROUTE = Route(type="http", id="1", domain="a.test", service="web", drain_backends=True)
SECOND = Route(type="http", id="2", domain="b.test", service="web", drain_backends=True)
A = Instance.at("10.0.0.1:80", "http", {"FLYNN_JOB_ID": "host1-a", "FLYNN_APP_NAME": "shop"})
B = Instance.at("10.0.0.2:80", "http", {"FLYNN_JOB_ID": "host1-b"})


def told(events: list[RouterEvent]) -> list[str]:
    return [
        f"{event.event} {event.backend.job_id or event.backend.addr}"
        if event.backend
        else f"{event.event} {event.route.id if event.route else ''}"
        for event in events
    ]


def test_a_rolling_deploy() -> None:
    presence = Presence()
    assert told(presence.applied([ROUTE], {"web": [A]})) == ["set 1", "backend-up host1-a"]
    assert told(presence.applied([ROUTE], {"web": [A]})) == []
    assert told(presence.applied([ROUTE], {"web": [A, B]})) == ["backend-up host1-b"]
    assert not presence.draining
    assert told(presence.applied([ROUTE], {"web": [B]})) == ["backend-down host1-a"]
    assert presence.draining
    assert told(presence.idle({("web", A.addr): 2})) == []
    assert told(presence.idle({("web", A.addr): 0, ("web", B.addr): 7})) == ["backend-drained host1-a"]
    assert not presence.draining


def test_a_backend_that_returns_is_not_drained() -> None:
    presence = Presence()
    presence.applied([ROUTE], {"web": [A]})
    presence.applied([ROUTE], {"web": []})
    assert told(presence.applied([ROUTE], {"web": [A]})) == ["backend-up host1-a"]
    assert told(presence.idle({})) == []


def test_services_that_do_not_ask_for_draining_are_not_tracked() -> None:
    plain = Route(type="http", id="3", domain="c.test", service="other")
    presence = Presence()
    assert told(presence.applied([plain], {"other": [A]})) == ["set 3"]
    assert told(presence.applied([plain], {"other": []})) == []


def test_only_the_last_route_takes_the_backends_down() -> None:
    presence = Presence()
    presence.applied([ROUTE, SECOND], {"web": [A]})
    assert told(presence.applied([SECOND], {"web": [A]})) == ["remove 1"]
    assert told(presence.applied([], {"web": [A]})) == ["backend-down host1-a", "remove 2"]
    assert not presence.draining


def test_a_job_that_takes_over_an_address_is_announced() -> None:
    presence = Presence()
    presence.applied([ROUTE], {"web": [A]})
    successor = Instance.at(A.addr, "http", {"FLYNN_JOB_ID": "host1-c"})
    assert told(presence.applied([ROUTE], {"web": [successor]})) == ["backend-up host1-c"]


def test_replay() -> None:
    presence = Presence()
    presence.applied([ROUTE], {"web": [A]})
    assert told(presence.replay(routes=False)) == ["backend-up host1-a"]
    assert told(presence.replay(routes=True)) == ["set 1", "backend-up host1-a"]
