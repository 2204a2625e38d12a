"""Releases on a real daemon: pulled over its API, run from, and layers that were tampered with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flynn.host.client import HostClient
from flynn.jobspec import mountspecs
from flynn.types.artifact import Artifact
from flynn.types.codec import convert, replace
from flynn.types.errors import ApiError, ValidationError
from flynn.types.host import JobEventKind, Mountspec
from tests.publisher import Publisher, images_of

from .machine import TestMachine, run_to_end
from .test_daemon_jobs import job, output

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def publisher(tmp_path: Path, layer_file: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.image("shell", [made.layer(f"shell-{tmp_path.name}", layer_file.read_bytes())])
    made.release("v20260725.0")
    return made


async def test_a_release_is_pulled_and_its_images_run(
    host: HostClient, machine: TestMachine, publisher: Publisher
) -> None:
    with pytest.raises(ApiError, match="this host trusts no repository yet"):
        [_ async for _ in host.pull_images(str(publisher.out))]
    with pytest.raises(ValidationError):
        [_ async for _ in host.pull_images("")]
    (machine.config / "tuf-root.json").write_bytes(publisher.root.read_bytes())

    pulled = [info async for info in host.pull_images(str(publisher.out), "v20260725.0")]
    assert [(info.type, info.name) for info in pulled] == [("layer", "shell"), ("image", "shell")]
    artifact = convert(pulled[1].artifact, Artifact)
    assert images_of(machine.config / "images.v20260725.0.json") == {"shell": artifact}

    (spec,) = mountspecs([artifact])
    running = job(spec, "echo from a release")
    await run_to_end(host, running)
    assert await output(host, running.id) == "from a release\n"

    # The host that lost the layer gets it again from the repository, by its signature.
    (machine.state / f"layers/{spec.id}.squashfs").unlink()
    running = job(spec, "echo again")
    await run_to_end(host, running)
    assert await output(host, running.id) == "again\n"

    again = machine.tool("download", "-r", str(publisher.out), "--version", "v20260725.0")
    assert "0 layers fetched" in again.stderr


async def test_a_job_on_a_layer_that_was_tampered_with_does_not_start(
    host: HostClient, machine: TestMachine, image: Mountspec, tmp_path: Path, layer_file: Path
) -> None:
    content = layer_file.read_bytes()
    source = tmp_path / "own.squashfs"
    source.write_bytes(content)
    hashes = {"sha256": hashlib.sha256(content).hexdigest()}
    spec = replace(image, id=f"own-{tmp_path.name}", url=f"file://{source}", hashes=hashes)
    await run_to_end(host, job(spec, "true"))
    source.unlink()
    file = machine.state / f"layers/{spec.id}.squashfs"
    file.write_bytes(content[:5000] + b"tampered" + content[5008:])

    refused = job(spec, "true")
    events = await run_to_end(host, refused)
    assert JobEventKind.START not in [event.event for event in events]
    assert (reason := (await host.job(refused.id)).error) is not None
    assert "has sha256" in reason and "it cannot be fetched anew" in reason

    file.write_bytes(content)
    events = await run_to_end(host, job(spec, "true"))
    assert JobEventKind.START in [event.event for event in events]
