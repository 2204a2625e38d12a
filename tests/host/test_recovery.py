"""The host dies at every step of a job's start and end; the next daemon, started as always, leaves nothing behind.

See flynn/host/steps.py for the steps, recovery.py for what is expected.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.client import HostClient
from flynn.host.runtime import loop
from flynn.host.steps import FAULT, POWER_CUT, STEPS
from flynn.types.codec import replace
from flynn.types.errors import ApiError
from flynn.types.host import ActiveJob, HostJob, JobStatus, Mountspec, VolumeBinding
from flynn.types.volume import VolumeRequest

from . import recovery
from .machine import TestMachine, eventually
from .recovery import AROUND_THE_FORK, DAEMON, DONE, GONE, KINDS, ONCE, POWER, ROWS, TWICE, ZYGOTE, Row, render
from .test_daemon_jobs import job

pytestmark = [pytest.mark.root, pytest.mark.slow]

ENDING = list(STEPS).index("stop-asked")
OF_THE_DAEMON = ("scratch-formatted", "restored")  # passed at its own start
SCRIPT = "echo started >> /keep/starts; trap {} TERM; echo up; while true; do sleep 0.1; done"


@pytest.fixture(scope="module")
def node(image: Mountspec, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Node]:
    kind: str = request.param
    node = Node(tmp_path_factory.mktemp("node"), image, number=3)
    node.kind = kind
    try:
        node.plug_in()
        yield node
    finally:
        node.remove()


class Node(TestMachine):
    """A node that can be looked over for what jobs have left on it."""

    __test__ = False
    kind = DAEMON

    def dies(self, step: str) -> dict[str, str]:
        """The environment of a daemon that is to die at a step."""
        return {FAULT: f"{step}:{self.kind}", POWER_CUT: self.name}

    def wait_for_death(self) -> None:
        assert self.process is not None
        assert self.process.wait(30) == -signal.SIGKILL
        self._console_start = len(self.console.read_text())
        if self.kind == POWER:
            self.cut_the_power()

    def cut_the_power(self) -> None:
        """What the kernel knew is gone. (That the processes are, the dying daemon has seen to.)"""
        self.kill_containers()
        for path in loop.mount_points(self.directory):
            loop.unmount(path)
        inside = ["nsenter", f"--net=/run/netns/{self.name}"]
        subprocess.run([*inside, "ip", "link", "del", self.name[:15]], check=False, capture_output=True)
        subprocess.check_call([*inside, "nft", "flush", "ruleset"])

    def begin_anew(self) -> None:
        """Forget all jobs there have been, however they are now."""
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.cut_the_power()
        for name in ("jobs", "scratch", "volumes"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        for file in self.state.glob("host.db*"):
            file.unlink()

    # Looking

    def mounts(self) -> list[str]:
        """What is mounted of jobs: all but the write layers kept ready."""
        ready = {f"{path}" for path in self.state.glob("scratch/*/fs")}
        return [str(path) for path in loop.mount_points(self.directory) if str(path) not in ready]

    def ready_layers(self) -> int:
        return len(list(self.state.glob("scratch/*")))

    def loop_devices(self) -> list[str]:
        """Files behind loop devices of this node."""
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                found.append(backing.read_text().strip())
            except OSError:
                continue
        return [file for file in found if file.startswith(f"{self.directory}/")]

    def cgroups(self) -> list[str]:
        """Cgroups of jobs, by path."""
        return [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{self.name}/*/*/") if path.is_dir()]

    def interfaces(self) -> list[str]:
        links = subprocess.check_output(["ip", "-n", self.name, "-o", "link"], text=True)
        return re.findall(r"^\d+: (vflynn[^:@]*)", links, re.MULTILINE)

    def trusted(self) -> str:
        """Addresses of system jobs in the packet filter."""
        inside = ["nsenter", f"--net=/run/netns/{self.name}", "nft", "list", "ruleset"]
        rules = subprocess.check_output(inside, text=True)
        found = re.search(r"set trusted \{(.*?)\n\t\}", rules, re.DOTALL)
        return "".join(re.findall(r"elements = \{[^}]*\}", found[1])) if found else ""

    def processes(self) -> list[str]:
        """Everything that runs in the node's network, and inits wherever they are."""
        inside = subprocess.check_output(["ip", "netns", "pids", self.name], text=True).split()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "fd/2").startswith(f"{self.state}/"):
                    inside.append(entry.name)
            except OSError:
                continue
        return inside

    def files(self) -> list[str]:
        """Directories and temporary files of jobs."""
        return sorted(
            str(path.relative_to(self.state))
            for pattern in ("jobs/*", "layers/*", "layers/.*.part", "layers/mnt/*")
            for path in self.state.glob(pattern)
            if path.name not in ("mnt", "busybox.squashfs")
        )


CASES = [(kind, row) for kind in KINDS for row in ROWS if kind != ZYGOTE or row.step in AROUND_THE_FORK]


@pytest.mark.parametrize(
    ("node", "row"),
    [pytest.param(kind, row, id=f"{kind}-{row.step}") for kind, row in CASES],
    indirect=["node"],
    scope="module",
)
async def test_the_host_dies_and_comes_back(node: Node, image: Mountspec, row: Row) -> None:
    at_the_start = row.step in OF_THE_DAEMON
    await asyncio.to_thread(node.start, env={} if at_the_start else node.dies(row.step))
    try:
        async with node.client() as host:
            await node.configure(host)
            wanted = await _job(host, image, row.step)
            await _until_it_dies(node, host, wanted, row.step)
        await asyncio.to_thread(node.start)
        async with node.client() as host:
            await node.configure(host)
            try:
                found = await _settled(host, wanted.id)
            except (TimeoutError, ApiError):
                pytest.fail(f"the job does not come to an end:\n{node.console.read_text()[-3000:]}")
            assert _became(node, wanted, found) == row.expected(node.kind), found
            if not found.status.down:
                await host.stop_job(wanted.id)
            kept = wanted.config.volumes[0].volume
            with contextlib.suppress(TimeoutError):  # the assertion says what is left
                await eventually(lambda: _clean(node))
            assert (node.mounts(), node.cgroups(), node.interfaces(), node.files()) == ([], [], [], [])
            assert node.trusted() == ""
            assert [volume.id for volume in await host.volumes()] == [kept]
            assert [path.name for path in (node.state / "volumes/directory").iterdir()] == [kept]
            await eventually(lambda: _ready(node))
            await host.destroy_volume(kept)
        await asyncio.to_thread(node.end)
        assert (loop.mount_points(node.directory), list(node.state.glob("scratch/*"))) == ([], [])
        await eventually(lambda: _quiet(node))
        assert (node.loop_devices(), node.processes()) == ([], [])
    except BaseException:
        await asyncio.to_thread(node.begin_anew)  # one failure is enough: the next step is not to trip over it
        raise


async def _job(host: HostClient, image: Mountspec, step: str) -> HostJob:
    """A system job with an address, a certificate, a volume that stays and one that is to go with it."""
    ids = [(await host.create_volume(VolumeRequest())).id for _ in range(2)]
    volumes = [
        VolumeBinding(target="/keep", volume=ids[0], writeable=True),
        VolumeBinding(target="/temporary", volume=ids[1], writeable=True, delete_on_stop=True),
    ]
    on_term = "''" if step == "killed" else "'exit 0'"
    wanted = job(image, SCRIPT.format(on_term), volumes=volumes)
    return replace(wanted, metadata={**wanted.metadata, "flynn-system-app": "true"})


async def _until_it_dies(node: Node, host: HostClient, wanted: HostJob, step: str) -> None:
    try:
        await host.add_job(wanted)
        if step in OF_THE_DAEMON or list(STEPS).index(step) >= ENDING:
            await eventually(lambda: _up(host, node, wanted))
        if step in OF_THE_DAEMON:
            await asyncio.to_thread(node.end)
            with pytest.raises(RuntimeError, match="the daemon does not start"):
                await asyncio.to_thread(node.start, env=node.dies(step))
        elif list(STEPS).index(step) >= ENDING:
            await host.stop_job(wanted.id)
    except ApiError:
        pass  # it died before it answered
    await asyncio.to_thread(node.wait_for_death)


async def _up(host: HostClient, node: Node, wanted: HostJob) -> bool:
    return (await host.job(wanted.id)).status is JobStatus.RUNNING and _starts(node, wanted) == 1


def _starts(node: Node, wanted: HostJob) -> int:
    """How often the job's process has been started."""
    file = node.state / "volumes/directory" / wanted.config.volumes[0].volume / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


async def _settled(host: HostClient, job_id: str) -> ActiveJob:
    """Wait until it runs or is down, and give its process the time to say so."""
    async with asyncio.timeout(40):
        while (found := await host.job(job_id)).status is JobStatus.STARTING or (
            found.force_stop and not found.status.down
        ):
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    return await host.job(job_id)


def _became(node: Node, wanted: HostJob, found: ActiveJob) -> str:
    match found.status:
        case JobStatus.RUNNING:
            return {1: ONCE, 2: TWICE}.get(_starts(node, wanted), f"runs, started {_starts(node, wanted)} times")
        case JobStatus.DONE:
            return DONE
        case JobStatus.FAILED if "the container is gone" in (found.error or ""):
            return GONE
    return f"{found.status.name.lower()}, {found.error}, {found.exit_status}"


async def _clean(node: Node) -> bool:
    return not (node.mounts() or node.cgroups() or node.interfaces() or node.files())


async def _ready(node: Node) -> bool:
    return node.ready_layers() == 2


async def _quiet(node: Node) -> bool:
    return not (node.loop_devices() or node.processes())


def test_every_step_is_in_the_table_and_the_table_in_the_docs() -> None:
    assert [row.step for row in ROWS] == list(STEPS)
    assert render() in recovery.PAGE.read_text(), "python -m tests.host.recovery"
