"""A short form of `make drill`: faults of several kinds, with its witnesses and its idea of being whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.lab.trio import TrioUser
from tests.drill.run import Drill, choose

pytestmark = pytest.mark.cluster3

FAULTS = [
    "kill-postgres-primary",
    "kill-every-host",
    "deploy-workers-killed",
    "push-gitreceive-killed",
    "disk-full",
    "power-all",
]


@pytest.fixture(scope="module")
def drill(user: TrioUser, app: str) -> Iterator[Drill]:
    drill = Drill()
    drill.set_up(user)
    yield drill
    drill.tear_down()


@pytest.mark.parametrize("name", FAULTS)
def test_it_survives(drill: Drill, name: str) -> None:
    line = drill.run(choose(name)[0])
    assert line.survived, line.problem or f"{line.outcome.acknowledged_lost} acknowledged writes are lost"
