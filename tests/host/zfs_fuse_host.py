"""Run by `unshare --mount`: a host on a machine of its own as far as zfs-fuse can see, whose zfs-fuse dies under a job.

Prints how the job ended, and what its successor found on the volume.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import uuid
from pathlib import Path

from flynn.types.host import ContainerConfig, HostJob, JobStatus, Mountspec, VolumeBinding
from flynn.types.volume import VolumeRequest
from tests.host.machine import META, TestMachine, ended, eventually
from tests.host.zfs_fuse_death import daemon, hide_the_real_one


async def main(directory: Path, layer: Path) -> None:
    content = layer.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    image = Mountspec(
        type="squashfs", id="busybox", url=f"file://{layer}", size=len(content), hashes={"sha256": digest}
    )
    machine = TestMachine(directory, image, number=4, provider="zfs")
    try:
        machine.plug_in()
        machine.start()
        async with machine.client() as host:
            await machine.configure(host)
            volume = await host.create_volume(VolumeRequest())

            def job(script: str) -> HostJob:
                bindings = [VolumeBinding(target="/data", volume=volume.id, writeable=True)]
                config = ContainerConfig(args=["sh", "-c", script], volumes=bindings)
                return HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config)

            # fsync, as databases do: `sync` does not come through to a file system in user space.
            fill = "echo kept | dd of=/data/word conv=fsync && touch /data/synced"
            writer = job(f"{fill} && while :; do sleep 1; done")
            await host.add_job(writer)
            synced = machine.state / "volumes" / "zfs" / "mnt" / "data" / volume.id / "synced"

            async def written() -> bool:
                return synced.exists()

            await eventually(written, seconds=60)
            os.kill(daemon(), signal.SIGKILL)
            await ended(host, writer.id, seconds=90)
            lost = await host.job(writer.id)
            assert lost.status == JobStatus.CRASHED
            print(lost.error)
            reader = job("test kept = $(cat /data/word)")
            await host.add_job(reader)
            await ended(host, reader.id, seconds=60)
            print((await host.job(reader.id)).exit_status, (await host.status()).volumes[0].trouble or "available")
    finally:
        machine.remove()
        os.kill(daemon(), signal.SIGTERM)


hide_the_real_one()
asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
