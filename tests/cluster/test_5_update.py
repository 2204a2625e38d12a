"""A release goes onto the host and onto everything that runs on it, by one command, and no request fails meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.types.artifact import Artifact
from flynn.types.codec import decode, encode, replace
from tests.cluster.conftest import Operator
from tests.cluster.lab.layout import CACHE, IMAGES
from tests.cluster.lab.user import User, eventually
from tests.cluster.test_4_operation import SYSTEM_APPS, Traffic
from tests.program_maker import Maker

pytestmark = pytest.mark.cluster

VERSION = "v20260801.0"


@pytest.fixture
def traffic(user: User, shop: Path) -> Iterator[Traffic]:
    with Traffic(user.env["NODE_IPS"].split(",")[0], f"shop.{user.domain}") as traffic:
        yield traffic


@pytest.fixture
def maker(operator: Operator, tmp_path: Path) -> Iterator[Maker]:
    """Has released every image of this cluster with one more layer, and flynn-host as another version."""
    made = Maker(tmp_path)
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/flynn-release").write_text(f"{VERSION}\n")
    squashfs = tmp_path / "layer.squashfs"
    subprocess.check_call(["mksquashfs", tmp_path / "layer", squashfs, "-quiet", "-no-progress"], stdout=sys.stderr)
    layer = made.layer(f"update-{time.time_ns():x}", squashfs.read_bytes())
    made.images.mkdir(exist_ok=True)
    for file in IMAGES.glob("*.json"):
        artifact = decode(file.read_bytes(), Artifact)
        manifest = artifact.image()
        for known in manifest.layers():
            if not made.store.squashfs(known.id).exists():
                os.link(CACHE / "layers" / f"{known.id}.squashfs", made.store.squashfs(known.id))
        first, *others = manifest.rootfs
        manifest = replace(manifest, rootfs=[replace(first, layers=[*first.layers, layer]), *others])
        changed = replace(
            artifact,
            manifest=manifest.document(),
            hashes={"sha512_256": manifest.id()},
            size=len(manifest.canonical()),
            uri=f"file:///nowhere/{manifest.id()}.json",
        )
        (made.images / file.name).write_bytes(encode(changed))
    made.program(VERSION)
    shutil.copy(made.root, operator.node.config / "tuf-root.json")
    shutil.rmtree(operator.node.state / "tuf", ignore_errors=True)  # what the host knows of an earlier run's keys
    yield made
    shutil.rmtree(Path(sys.prefix) / "versions", ignore_errors=True)


def test_one_command_updates_host_and_apps(user: User, operator: Operator, traffic: Traffic, maker: Maker) -> None:
    before = {job["job"]["id"] for job in operator.jobs()}  # type: ignore[index]
    began = time.monotonic()
    done = operator.run("flynn-host", "update", "-r", str(maker.out), "--json", timeout=900)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [step["step"] for step in steps if "host" in step] == ["images", "program", "daemon"]
    deployed = [step["app"] for step in steps if "app" in step]
    assert set(deployed) >= {*SYSTEM_APPS, "shop"} and deployed.index("discoverd") < deployed.index("controller")
    assert deployed.index("controller") < deployed.index("shop")
    print(f"{len(deployed)} apps in {time.monotonic() - began:.0f} s, {traffic.asked} requests")
    assert traffic.failed == []

    def all_new() -> bool:
        jobs = operator.jobs()
        return not before & {job["job"]["id"] for job in jobs} and all(  # type: ignore[index]
            any(spec["id"].startswith("update-") for spec in job["job"]["mountspecs"])  # type: ignore[index]
            for job in jobs
        )

    eventually(all_new, 60)
    assert user.run("flynn", "-a", "shop", "run", "cat", "/flynn-release").stdout == f"{VERSION}\n"

    # The builder and runner of the next push are the new ones as well; and there is nothing left to be done.
    again = operator.run("flynn-host", "update", "-r", str(maker.out), "--json", timeout=300)
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["step"] for line in again.stdout.splitlines()] == ["images", "program", "already"]
