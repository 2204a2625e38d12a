"""A daemon is killed at any moment; the next one takes over what runs, and nothing of the rest remains."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.runtime import loop
from flynn.host.runtime.cgroups import CgroupTree, layout_from
from flynn.host.runtime.layers import LayerMounts
from flynn.host.runtime.runtime import Container, ContainerLost, Runtime, State
from flynn.host.runtime.scratch import ScratchPool

pytestmark = [pytest.mark.root, pytest.mark.slow]


def inits(below: Path) -> list[int]:
    """Processes whose standard error is the init.log of a container below this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd/2").startswith(f"{below}/"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def cgroup_root(tmp_path: Path) -> Iterator[str]:
    """A name; and an end to everything even when the test fails, or the next run could not delete its directory."""
    name = f"flynn-crash-{os.getpid()}"
    yield name
    CgroupTree(layout_from(Path("/proc/self/mountinfo").read_text()), name).remove_all()
    for path in loop.mount_points(tmp_path):
        loop.unmount(path)


@pytest.mark.parametrize("seed", range(12))
async def test_killed_anywhere(seed: int, layer: Path, tmp_path: Path, cgroup_root: str) -> None:
    chance = random.Random(seed)
    program = Path(__file__).with_name("crashing_daemon.py")
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, str(program), str(tmp_path), str(layer), cgroup_root), stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    assert await daemon.stdout.readline() == b"up\n"
    await asyncio.sleep(chance.uniform(0.0, 0.4))
    daemon.kill()
    await daemon.wait()
    await asyncio.sleep(chance.choice((0, 0.05)))

    layers, scratch = LayerMounts(tmp_path / "layers"), ScratchPool(tmp_path / "scratch")
    async with Runtime(state_dir=tmp_path, cgroup_root=cgroup_root) as runtime:
        taken: list[Container] = []
        for directory in (tmp_path / "jobs").glob("*"):
            try:
                container = await runtime.reconnect(directory)
            except ContainerLost:
                continue
            taken.append(container)
            layers.adopt(container.id, container.spec.rootfs.lower)
            scratch.adopt(Path(container.spec.rootfs.writable or ""))
        await runtime.collect_leftovers([container.id for container in taken])
        await layers.collect()
        await scratch.collect()
        for container in taken:
            if container.state is State.CREATED:
                await container.resume()
            await container.destroy()
            await scratch.release(Path(container.spec.rootfs.writable or ""))
            await layers.release(container.id)
        async with asyncio.timeout(5):
            while left := inits(tmp_path):
                await asyncio.sleep(0.05)
                await runtime.collect_leftovers([])
        assert left == []
    assert loop.mount_points(tmp_path) == []
    assert list((tmp_path / "scratch").iterdir()) == []
    async with asyncio.timeout(5):
        while [name for _, name in socket.if_nameindex() if name.startswith("vflynn")]:
            await asyncio.sleep(0.05)
