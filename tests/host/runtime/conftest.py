"""A root file system of busybox, a runtime of its own per test, and a look for leftovers afterwards."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flynn.host.network import bridge
from flynn.host.runtime import kernel
from flynn.host.runtime.runtime import Container, Exit, Runtime
from flynn.host.runtime.spec import DEFAULT_PATH, ContainerSpec, Network, RootFS
from tests.host.machine import busybox_root

BRIDGE = "rtbr0"
ADDRESS = "100.101.7.1"


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A squashfs image with /bin/busybox and a link per applet."""
    work = tmp_path_factory.mktemp("layer")
    root = work / "root"
    busybox_root(root)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "notexec").write_text("x")
    image = work / "busybox.squashfs"
    subprocess.check_call(["mksquashfs", root, image, "-quiet", "-no-progress", "-noappend"], stdout=subprocess.DEVNULL)
    return image


@pytest.fixture(scope="session")
def lower(layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image, mounted."""
    target = tmp_path_factory.mktemp("lower")
    subprocess.check_call(["mount", "-o", "loop,ro", layer, target])
    yield str(target)
    subprocess.check_call(["umount", "-l", target])


@pytest.fixture(scope="module", autouse=True)  # a wider scope would last to the end of the whole run
def private_network() -> Iterator[None]:
    """The tests' own network namespace with a bridge, so that they meet nothing of the machine's."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    kernel.unshare(kernel.CLONE_NEWNET)
    try:
        subprocess.check_call(["ip", "link", "set", "lo", "up"])
        from ipaddress import IPv4Interface

        bridge.ensure_bridge(BRIDGE, IPv4Interface(f"{ADDRESS}/24"), 1400)
        yield
    finally:
        kernel.setns(before, kernel.CLONE_NEWNET)
        os.close(before)


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    runtime = Runtime(state_dir=tmp_path, cgroup_root=f"flynn-test-{os.getpid()}")
    async with runtime:
        try:
            yield runtime
        finally:
            left = await runtime.collect_leftovers(())
            runtime.cgroups.remove_all()
    assert left == [], "containers were left behind"


@pytest.fixture
def spec(tmp_path: Path, lower: str) -> Callable[..., ContainerSpec]:
    """Make a spec running a shell script; other fields by name."""
    count = 0

    def make(script: str = "true", **fields: Any) -> ContainerSpec:
        nonlocal count
        count += 1
        writable = tmp_path / f"scratch{count}"
        writable.mkdir()
        name = f"host-{count}"
        base = ContainerSpec(
            id=name,
            directory=str(tmp_path / "jobs" / name),
            hostname=name,
            args=("sh", "-c", script),
            env={"PATH": DEFAULT_PATH},
            rootfs=RootFS(lower=(lower,), writable=str(writable)),
        )
        return replace(base, **fields)

    return make


def network(last: int, mtu: int = 1400) -> Network:
    return Network(bridge=BRIDGE, address=f"100.101.7.{last}", prefix=24, gateway=ADDRESS, mtu=mtu)


async def read(fd: int | None) -> str:
    """Read to the end; a terminal's end is EIO."""
    assert fd is not None
    loop = asyncio.get_running_loop()
    collected = b""
    while True:
        readable = asyncio.Event()
        loop.add_reader(fd, readable.set)
        try:
            async with asyncio.timeout(10):
                await readable.wait()
        finally:
            loop.remove_reader(fd)
        try:
            chunk = os.read(fd, 65536)
        except BlockingIOError:
            continue
        except OSError:
            return collected.decode()
        if not chunk:
            return collected.decode()
        collected += chunk


async def run(runtime: Runtime, spec: ContainerSpec) -> tuple[Exit, str, str]:
    """Run to the end; the exit and both outputs."""
    container = await runtime.create(spec)
    try:
        await container.resume()
        if spec.tty:
            out, err = await read(container.pty), ""
        else:
            out, err = await asyncio.gather(read(container.stdout), read(container.stderr))
        async with asyncio.timeout(10):
            return await container.wait(), out, err
    finally:
        await container.destroy()


async def started(runtime: Runtime, spec: ContainerSpec) -> Container:
    container = await runtime.create(spec)
    await container.resume()
    return container
