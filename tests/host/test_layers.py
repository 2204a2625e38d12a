"""The layer store: verified when a layer comes, and again before it is used after that."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from flynn.aio.supervisor import TaskSet
from flynn.host.download.errors import NotReleased
from flynn.host.layers import LayerStore
from flynn.host.releases import Releases
from flynn.host.runtime import layers as runtime_layers
from flynn.host.runtime.layers import LayerError
from flynn.http.client import HttpClient
from flynn.types.codec import replace, sha512_256
from flynn.types.host import Mountspec
from tests.publisher import Publisher

CONTENT = b"debian" * 1000


async def _no_client(base_url: str) -> HttpClient:
    raise AssertionError(base_url)


class Released:
    """A repository that has nothing."""

    async def fetch(self, repository: str, name: str, into: Path) -> NoReturn:
        raise NotReleased(f"{repository} has not signed any {name}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.squashfs"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def spec(source: Path) -> Mountspec:
    hashes = {"sha512_256": sha512_256(CONTENT)}
    return Mountspec(type="squashfs", id="base", url=f"file://{source}", size=len(CONTENT), hashes=hashes)


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    async with TaskSet() as started:
        yield started


def store(tmp_path: Path, tasks: TaskSet, *mounted: str) -> LayerStore:
    """The store as a daemon that has just started has it."""
    return LayerStore(
        tmp_path / "layers", _no_client, tasks, released=Released(), mounted=lambda layer_id: layer_id in mounted
    )


async def test_a_layer_comes_from_another_file_system(tmp_path: Path, tasks: TaskSet) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".squashfs") as source:
        source.write(CONTENT)
        source.flush()
        hashes = {"sha512_256": sha512_256(CONTENT)}
        spec = Mountspec(type="squashfs", id="far", url=f"file://{source.name}", size=len(CONTENT), hashes=hashes)
        assert (await store(tmp_path, tasks).ensure(spec)).read_bytes() == CONTENT


@pytest.mark.parametrize("again", ["the same daemon", "the next daemon"])
async def test_a_layer_changed_after_its_import_is_refused(
    again: str, tmp_path: Path, tasks: TaskSet, source: Path, spec: Mountspec
) -> None:
    first = store(tmp_path, tasks)
    file = await first.ensure(spec)
    source.unlink()
    file.write_bytes(CONTENT.replace(b"d", b"D"))
    following = first if again == "the same daemon" else store(tmp_path, tasks)
    with pytest.raises(LayerError, match=r"has sha512_256 .*, expected .*; and it cannot be fetched anew"):
        await following.ensure(spec)


async def test_a_changed_layer_is_fetched_anew_where_it_came_from(
    tmp_path: Path, tasks: TaskSet, spec: Mountspec
) -> None:
    layers = store(tmp_path, tasks)
    file = await layers.ensure(spec)
    file.write_bytes(b"tampered")
    assert (await layers.ensure(spec)).read_bytes() == CONTENT


async def test_a_changed_layer_is_not_exchanged_under_jobs_that_use_it(
    tmp_path: Path, tasks: TaskSet, spec: Mountspec
) -> None:
    file = await store(tmp_path, tasks).ensure(spec)
    file.write_bytes(b"tampered")
    with pytest.raises(LayerError, match="layer base refused, and jobs use it"):
        await store(tmp_path, tasks, "base").ensure(spec)
    assert file.read_bytes() == b"tampered"


async def test_a_job_that_wants_something_else_under_a_known_id_does_not_get_what_is_there(
    tmp_path: Path, tasks: TaskSet, source: Path, spec: Mountspec
) -> None:
    """Layer ids are chosen by whoever makes artifacts; only hashes say what a layer is."""
    layers = store(tmp_path, tasks, "base")
    await layers.ensure(spec)
    with pytest.raises(LayerError, match="refused"):
        await layers.ensure(replace(spec, hashes={"sha512_256": "0" * 64}))
    assert (await layers.ensure(spec)).read_bytes() == CONTENT


async def test_an_unchanged_layer_is_verified_once_per_daemon(
    tmp_path: Path, tasks: TaskSet, spec: Mountspec, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []

    def counting(path: Path, hashes: dict[str, str], length: int) -> None:
        verified.append(path.name)
        runtime_layers.verify(path, hashes, length)

    monkeypatch.setattr("flynn.host.layers.verify", counting)
    layers = store(tmp_path, tasks)
    for _ in range(3):
        await layers.ensure(spec)
    assert verified == [".base.part"]
    layers = store(tmp_path, tasks)
    for _ in range(3):
        await layers.ensure(spec)
    assert verified == [".base.part", "base.squashfs"]


async def test_use_is_noted_for_the_collection_without_another_verification(
    tmp_path: Path, tasks: TaskSet, source: Path, spec: Mountspec
) -> None:
    file = await store(tmp_path, tasks).ensure(spec)
    source.unlink()
    days_ago = time.time() - 6 * 86400
    os.utime(file, (days_ago, days_ago))
    layers = store(tmp_path, tasks)
    await layers.ensure(spec)
    assert time.time() - file.stat().st_mtime < 60
    await layers.ensure(spec)


async def test_a_layer_of_a_repository_is_fetched_by_its_signature(tmp_path: Path, tasks: TaskSet) -> None:
    publisher = Publisher(tmp_path)
    publisher.build()
    publisher.release("v20260725.0")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/tuf-root.json").write_bytes(publisher.root.read_bytes())
    layer = publisher.layer("base", CONTENT)
    spec = Mountspec(
        type="squashfs",
        id="base",
        url=f"file://{publisher.out}?target=/layers/base.squashfs",
        size=layer.length,
        hashes=layer.hashes,
    )
    releases = Releases(tmp_path / "state", tmp_path / "config", tmp_path / "programs")
    layers = LayerStore(tmp_path / "state/layers", _no_client, tasks, released=releases)
    assert (await layers.ensure(spec)).read_bytes() == CONTENT
    with pytest.raises(LayerError, match="has not signed any"):
        await layers.ensure(replace(spec, id="other", url=spec.url.replace("base", "other")))
    (publisher.out / "metadata/timestamp.json").write_text("{}")
    with pytest.raises(LayerError, match="not what a repository serves"):
        await layers.ensure(replace(spec, id="third"))
