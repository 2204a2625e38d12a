"""discoverd in real containers: a new release takes over from the old one, which its host still runs."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flynn.discoverd.client import Discoverd
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.app import HANDS_OVER, SYSTEM_APP
from flynn.types.codec import builtins, replace
from flynn.types.errors import ApiError
from flynn.types.host import ContainerConfig, HostJob, JobStatus, Mount, Mountspec, NetworkConfig, VolumeBinding
from flynn.types.instance import ServiceMeta
from flynn.types.release import Port
from flynn.types.rollout import Rollout
from flynn.types.status import StatusDocument
from flynn.types.volume import VolumeRequest

from .machine import APP, TestMachine, eventually, sweep

pytestmark = [pytest.mark.root, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
BRIDGE = "100.102.9.1"


@pytest.fixture
def machine(image: Mountspec, tmp_path: Path) -> Iterator[TestMachine]:
    sweep()
    node = TestMachine(tmp_path, image, number=3)
    try:
        node.plug_in()
        node.start()
        yield node
    finally:
        node.remove()


def job(machine: TestMachine, volume: str, release: str) -> HostJob:
    """discoverd as the platform runs it, but for its image: this machine's Python and this repository."""
    directories = ("/usr", "/lib", "/lib64", "/bin", str(REPOSITORY), sys.base_prefix)
    mounts = [Mount(location=one, target=str(Path(one).resolve())) for one in dict.fromkeys(directories)]
    identifier = f"node1-{uuid.uuid4()}"
    metadata = {"app": APP, "app_name": "discoverd", "type": "app", "release": release}
    return HostJob(
        id=identifier,
        mountspecs=[machine.image],
        metadata={
            SYSTEM_APP: "true",
            HANDS_OVER: "true",
            **{f"flynn-controller.{key}": value for key, value in metadata.items()},
        },
        config=ContainerConfig(
            args=[f"{REPOSITORY}/.venv/bin/python", "-I", f"{REPOSITORY}/.venv/bin/flynn-discoverd"],
            host_network=True,
            env={
                "DISCOVERD": "none",
                "FLYNN_RELEASE_ID": release,
                "FLYNN_APP_NAME": "discoverd",
                "FLYNN_JOB_ID": identifier,
            },
            mounts=mounts,
            volumes=[VolumeBinding(target="/data", volume=volume, writeable=True)],
            ports=[Port(port=1111, proto="tcp"), Port(port=53, proto="tcp")],
        ),
    )


class Directory:
    def __init__(self, machine: TestMachine) -> None:
        self._identity = Identity.load(machine.state / "identity")
        self._address = f"{machine.ip}:1111"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Discoverd]:
        async with Discoverd.connect(self._address, identity=self._identity) as client:
            yield client

    async def release(self) -> str:
        """Of the process that answers, once it answers names as well."""
        try:
            async with HttpClient(f"https://{self._address}", tls=self._identity, timeout=3) as http:
                detail = (await http.get("/.well-known/status", answer=StatusDocument)).data.detail
        except ApiError:
            return ""
        return str(detail["release"]) if detail["dns"] == f"{BRIDGE}:53" else ""


async def test_a_new_release_takes_over_in_its_own_container(machine: TestMachine) -> None:
    directory = Directory(machine)
    written = 0

    async def write() -> None:
        nonlocal written
        async with directory.client() as client:
            meta = await client.put_meta("counter", ServiceMeta(data=0))
            while True:
                meta = await client.put_meta("counter", replace(meta, data=meta.data + 1))
                written += 1

    async with machine.client() as host:
        volume = (await host.create_volume(VolumeRequest())).id
        old, new = job(machine, volume, "r1"), job(machine, volume, "r2")
        await host.add_job(old)
        await host.configure_network(NetworkConfig(subnet=f"{BRIDGE}/24", mtu=1400, network="100.102.0.0/16"))

        async def answers(release: str) -> bool:
            return await directory.release() == release

        await eventually(lambda: answers("r1"), 40)
        async with directory.client() as client:
            await client.create("counter")
            writing = asyncio.ensure_future(write())
            rollout = Rollout(id="d1", release="r2")
            await client.put_meta("discoverd", ServiceMeta(data=builtins(rollout)))
            await host.add_job(new)
            await eventually(lambda: answers("r2"), 40)
            await eventually(lambda: _is_done(client), 20)
            [instance] = await client.instances("discoverd")
        assert instance.meta["FLYNN_JOB_ID"] == new.id
        assert (await host.status()).discoverd.job_id == new.id  # type: ignore[union-attr]
        assert [(await host.job(one.id)).status for one in (old, new)] == [JobStatus.RUNNING] * 2
        before = written
        await host.stop_job(new.id)  # as a deployment does that is taken back
        await eventually(lambda: answers("r1"), 40)
        await eventually(lambda: _true(written > before + 20), 20)
        assert (await host.status()).discoverd.job_id == old.id  # type: ignore[union-attr]
        assert not writing.done()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await host.stop_job(old.id)


async def _is_done(client: Discoverd) -> bool:
    meta = await client.get_meta("discoverd")
    return meta is not None and list(meta.data["states"].values()) == ["done"]


async def _true(value: bool) -> bool:
    return value
