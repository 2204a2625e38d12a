"""A fourth node: joins, observes, is promoted and demoted, is taken away again."""

from __future__ import annotations

import json

import pytest

from tests.cluster.lab import cluster, node
from tests.cluster.lab.layout import Node
from tests.cluster.lab.trio import Lab, TrioUser
from tests.cluster.lab.user import eventually

pytestmark = pytest.mark.cluster3

FOURTH = Node(3)


@pytest.fixture(scope="module", autouse=True)
def fourth(three: Lab, app: str) -> object:
    cluster.add(FOURTH.number)
    yield FOURTH
    node.remove(FOURTH)


def role(three: Lab) -> str | None:
    return three.roles().get(FOURTH.id)


def test_a_node_that_joins_gets_the_platforms_jobs_and_serves(three: Lab, app: str) -> None:
    eventually(lambda: role(three) == "proxy", 30)
    eventually(lambda: len(three.answering(FOURTH)) == 6, 60)
    status = json.loads(three.on(FOURTH, "flynn-host", "status", "--json"))
    assert status["discoverd"]["url"].startswith(f"{FOURTH.ip}:1111,")


def test_it_is_promoted_and_demoted(three: Lab, app: str) -> None:
    eventually(lambda: role(three) == "proxy", 30)
    three.on(three.nodes[0], "flynn-host", "promote", FOURTH.ip, timeout=100)
    assert role(three) == "peer"
    three.on(FOURTH, "flynn-host", "demote", FOURTH.ip, timeout=100)
    assert role(three) == "proxy"
    eventually(lambda: len(three.answering(FOURTH)) == 6, 30)  # a job may just be moving


def test_new_jobs_come_to_it_and_leave_it_when_it_is_drained(three: Lab, user: TrioUser, app: str) -> None:
    user.flynn("-a", app, "scale", "web=8")
    eventually(lambda: user.up()[FOURTH.id] >= 1, 60)
    three.on(FOURTH, "flynn-host", "drain", timeout=120)
    eventually(lambda: (lambda up: up[FOURTH.id] == 0 and sum(up.values()) == 8)(user.up()), 60)
    user.flynn("-a", app, "scale", "web=6")
    eventually(lambda: sum(user.up().values()) == 6, 60)


def test_a_member_that_will_not_come_back_is_removed_by_the_others(three: Lab, app: str) -> None:
    three.on(FOURTH, "flynn-host", "drain", "--undo")
    eventually(lambda: FOURTH.ip not in three.discoverd(FOURTH, "/raft/peers"), 60)  # once it answers again
    three.on(FOURTH, "flynn-host", "promote", FOURTH.ip, timeout=100)
    assert role(three) == "peer"
    node.power_cut(FOURTH)
    three.on(three.nodes[0], "flynn-host", "demote", "--force", FOURTH.ip, timeout=100)
    eventually(lambda: role(three) is None, 60)
    peers = three.discoverd(three.nodes[0], "/raft/peers")
    assert FOURTH.ip not in peers
