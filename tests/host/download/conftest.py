"""A repository with a release in it, and a host that trusts its root."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from flynn.aio.backoff import Backoff
from flynn.host.download.fetch import Limits
from flynn.host.download.pull import Places, Pulled, pull, wanted_version
from flynn.host.download.trust import TrustedRepository
from tests.publisher import Publisher

QUICK = Limits(
    answer=timedelta(seconds=0.4),
    silence=timedelta(seconds=0.3),
    window=timedelta(seconds=0.3),
    window_bytes=1000,
    tries=3,
    pause=Backoff(first=timedelta(milliseconds=1)),
)


class Host:
    """What a host has on its disk, and `download` on it."""

    def __init__(self, home: Path, root: Path) -> None:
        self.state, self.config, self.root = home / "state", home / "config", root
        self.told: list[Pulled] = []

    def trusting(self, repository: Path | str) -> TrustedRepository:
        return TrustedRepository(str(repository), self.state / "tuf", roots=(self.root,), limits=QUICK)

    def download(self, repository: Path | str, version: str = "") -> Path:
        self.told.clear()
        source = self.trusting(repository)
        source.refresh()
        wanted = wanted_version(source, version=version, channel="")
        return pull(source, wanted, Places(self.state / "layers", self.config), self.told.append)

    def layers(self) -> dict[str, bytes]:
        return {file.stem: file.read_bytes() for file in (self.state / "layers").glob("*.squashfs")}

    def files(self) -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in self.config.rglob("*") if file.is_file()}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.build()
    made.release("v20260725.0")
    return made


@pytest.fixture
def host(tmp_path: Path, publisher: Publisher) -> Host:
    return Host(tmp_path / "host", publisher.root)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def new_host(tmp_path: Path, publisher: Publisher) -> Callable[[str], Host]:
    return lambda name: Host(tmp_path / name, publisher.root)
