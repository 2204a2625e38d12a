"""A daemon that starts and destroys containers until it is killed: what test_crash.py runs and kills."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from flynn.host.runtime.layers import LayerMounts
from flynn.host.runtime.runtime import Runtime
from flynn.host.runtime.scratch import ScratchPool
from flynn.host.runtime.spec import DEFAULT_PATH, ContainerSpec, Network, RootFS


async def main(state: Path, image: Path, cgroup_root: str) -> None:
    layers = LayerMounts(state / "layers")
    async with Runtime(state_dir=state, cgroup_root=cgroup_root) as runtime, ScratchPool(state / "scratch") as scratch:
        print("up", flush=True)
        async with asyncio.TaskGroup() as group:
            for worker in range(3):
                group.create_task(work(runtime, layers, scratch, state, image, worker))


async def work(
    runtime: Runtime, layers: LayerMounts, scratch: ScratchPool, state: Path, image: Path, worker: int
) -> None:
    for count in range(1000):
        name = f"host-{worker}-{count}"
        lower = await layers.acquire("base", image, name)
        writable = await scratch.take(16 << 20)
        spec = ContainerSpec(
            id=name,
            directory=str(state / "jobs" / name),
            args=("sleep", "1000") if count % 2 else ("true",),
            env={"PATH": DEFAULT_PATH},
            rootfs=RootFS(lower=(str(lower),), writable=str(writable)),
            network=Network(bridge="rtbr0", address=f"100.101.7.{100 + worker}", prefix=24, gateway="100.101.7.1"),
        )
        container = await runtime.create(spec)
        await container.resume()
        if count % 2 == 0:
            await container.wait()
        await container.destroy()
        await scratch.release(writable)
        await layers.release(name)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
