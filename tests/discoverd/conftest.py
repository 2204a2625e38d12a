from pathlib import Path

import pytest

from flynn.identity.authority import ClusterCA
from tests.discoverd.harness import Place


@pytest.fixture(scope="session")
def ca() -> ClusterCA:
    return ClusterCA.create()


@pytest.fixture
def place(ca: ClusterCA, tmp_path: Path) -> Place:
    return Place(ca, tmp_path)
