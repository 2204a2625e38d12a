from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.identity.authority import ClusterCA
from tests.discoverd.harness import Place
from tests.discoverd.raft import Follower


@pytest.fixture(scope="session")
def ca() -> ClusterCA:
    return ClusterCA.create()


@pytest.fixture
def place(ca: ClusterCA, tmp_path: Path) -> Place:
    return Place(ca, tmp_path)


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    one = Follower(tmp_path)
    yield one
    one.member._doDestroy()
