"""Three nodes, and a user with an app on all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import node
from tests.cluster.lab.cluster import PUBLISHED, Phases, down, environment, up
from tests.cluster.lab.layout import nodes
from tests.cluster.lab.trio import APP, Lab, TrioUser
from tests.cluster.lab.user import eventually


@pytest.fixture(scope="session")
def three() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("a development cluster needs root")
    if not all(node.init_pid(member) for member in nodes(3)) or not (PUBLISHED / "env").exists():
        up(3, Phases())
    yield Lab(environment()["CLUSTER_DOMAIN"])
    if not os.environ.get("KEEP_CLUSTER"):
        down()


@pytest.fixture(scope="session")
def user(three: Lab) -> Iterator[TrioUser]:
    home = Path(tempfile.mkdtemp(prefix="flynn-user-"))
    someone = TrioUser(home)
    someone.enter_through(three.nodes[0])
    yield someone
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def app(three: Lab, user: TrioUser) -> str:
    """An app of six jobs that answers through every router."""
    directory = user.app(APP, "python")
    pushed = user.push(directory)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    user.flynn("-a", APP, "scale", "web=6")
    eventually(lambda: sum(user.up().values()) == 6)
    for member in three.nodes:
        eventually(lambda member=member: len(three.answering(member)) == 6)  # type: ignore[misc]
    return APP
