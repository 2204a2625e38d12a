"""What starting a container costs, and what its init weighs.

Ours: from a spec to the exec of the job's process, with an address on a bridge, memory and pid limits, an overlay on
squashfs and a write layer of its own. The peer: `runc run` of /bin/true on the same files, without any network.
`python -m bench.job_start` prints where the time goes as well.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from ipaddress import IPv4Interface
from pathlib import Path

from bench import processes, runc
from bench.rows import Row, table
from flynn.host.network.bridge import ensure_bridge
from flynn.host.runtime import kernel
from flynn.host.runtime.layers import LayerMounts
from flynn.host.runtime.runtime import Container, Runtime
from flynn.host.runtime.scratch import ScratchPool
from flynn.host.runtime.spec import DEFAULT_PATH, ContainerSpec, Limits, Network, RootFS

ROUNDS = 40
PAUSE = 0.1  # between starts: what one start costs, not how many fit into a second
SHIM_MB = 10.0  # documented for containerd-shim
RUNC = "runc run, no network"


def rows() -> list[Row]:
    work = Path(tempfile.mkdtemp(prefix="flynn-bench-"))
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    kernel.unshare(kernel.CLONE_NEWNET)
    try:
        return asyncio.run(_measure(work))
    finally:
        kernel.setns(namespace, kernel.CLONE_NEWNET)
        os.close(namespace)
        shutil.rmtree(work, ignore_errors=True)


async def _measure(work: Path) -> list[Row]:
    root, image = _build_root(work)
    ensure_bridge("bench0", IPv4Interface("100.102.0.1/24"), 1450)
    layers = LayerMounts(work / "layers")
    ours, peer, steps = [], [], []
    async with (
        Runtime(state_dir=work, cgroup_root=f"flynn-bench-{os.getpid()}") as runtime,
        ScratchPool(work / "scratch", ready=3) as scratch,
    ):
        try:
            runc.write_bundle(work / "bundle", root, ("/bin/true",))
            await asyncio.sleep(0.5)
            for count in range(ROUNDS):
                peer.append(await asyncio.to_thread(runc.run, work / "bundle", count))
                await asyncio.sleep(PAUSE)
                total, parts = await _start_one(runtime, layers, scratch, image, work, count)
                ours.append(total)
                steps.append(parts)
                await asyncio.sleep(PAUSE)
            weight = await _weigh(runtime, layers, scratch, image, work)
        finally:
            await runtime.collect_leftovers(())
            runtime.cgroups.remove_all()
            await layers.collect()
            await scratch.collect()
    names = ("storage", "create", "resume")
    print("  ".join(f"{name} {statistics.median(s[i] for s in steps):.1f} ms" for i, name in enumerate(names)))
    return [
        Row(
            name="container start, with network, p50",
            ours=statistics.median(ours),
            unit="ms",
            peer=statistics.median(peer),
            budget=1.0,
            against=RUNC,
        ),
        Row(name="container start, with network, p90", ours=_p90(ours), unit="ms", peer=_p90(peer), against=RUNC),
        Row(
            name="init memory per container (PSS, 10 running)",
            ours=weight,
            unit="MB",
            limit=SHIM_MB,
            budget=0.8,
            against="containerd-shim, documented",
        ),
    ]


def _p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def _spec(work: Path, count: int, lower: str, writable: str, args: tuple[str, ...]) -> ContainerSpec:
    return ContainerSpec(
        id=f"bench-{count}",
        directory=str(work / "jobs" / f"bench-{count}"),
        hostname=f"bench-{count}",
        args=args,
        env={"PATH": DEFAULT_PATH, "HOME": "/"},
        rootfs=RootFS(lower=(lower,), writable=writable),
        network=Network(
            bridge="bench0", address=f"100.102.0.{count % 250 + 2}", prefix=24, gateway="100.102.0.1", mtu=1450
        ),
        resolv_conf="nameserver 100.102.0.1\n",
        hosts="127.0.0.1 localhost\n",
        limits=Limits(memory_bytes=1 << 30, cpu_shares=1024, pids=4096, fds=(10000, 10000)),
    )


async def _start_one(
    runtime: Runtime, layers: LayerMounts, scratch: ScratchPool, image: Path, work: Path, count: int
) -> tuple[float, tuple[float, ...]]:
    begin = time.perf_counter()
    lower = await layers.acquire("base", image, f"bench-{count}")
    writable = await scratch.take()
    stored = time.perf_counter()
    container = await runtime.create(_spec(work, count, str(lower), str(writable), ("/bin/true",)))
    created = time.perf_counter()
    await container.resume()
    running = time.perf_counter()
    await container.wait()
    await container.destroy()
    await scratch.release(writable)
    if count:  # the first keeps the layer mounted, as the jobs of a node at work do
        await layers.release(f"bench-{count}")
    parts = (stored - begin, created - stored, running - created)
    return (running - begin) * 1000, tuple(part * 1000 for part in parts)


async def _weigh(runtime: Runtime, layers: LayerMounts, scratch: ScratchPool, image: Path, work: Path) -> float:
    """PSS of one init in MB, with ten of them running."""
    lower = await layers.acquire("base", image, "weigh")
    running: list[tuple[Container, Path]] = []
    for count in range(1000, 1010):
        writable = await scratch.take()
        container = await runtime.create(_spec(work, count, str(lower), str(writable), ("/bin/sleep", "1000")))
        await container.resume()
        running.append((container, writable))
    values = [processes.pss_mb(container.pid) for container, _ in running]
    for container, writable in running:
        await container.destroy()
        await scratch.release(writable)
    await layers.release("weigh")
    await layers.release("bench-0")
    return statistics.mean(values)


def _build_root(work: Path) -> tuple[Path, Path]:
    root = work / "root"
    for directory in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", root / "bin/busybox")
    for applet in ("true", "sleep", "sh"):
        (root / "bin" / applet).symlink_to("busybox")
    image = work / "base.squashfs"
    subprocess.run(["mksquashfs", root, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    return root, image


if __name__ == "__main__":
    print(table(rows()))
    sys.exit(0)
