"""A real flynn-host daemon in a network namespace of its own, for tests: started, killed and started again at will."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.host import DiscoverdConfig, HostJob, JobEvent, JobEventKind, JobStatus, Mountspec, NetworkConfig

BIN = Path(sys.executable).parent
APP = "6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11"
META = {"flynn-controller.app": APP, "flynn-controller.app_name": "shop", "flynn-controller.type": "web"}


class TestMachine:
    """One node: a namespace with a cable to the machine, a state directory, and the daemon's process."""

    __test__ = False

    def __init__(
        self, directory: Path, image: Mountspec, *, number: int, provider: str = "directory", id: str = "node1"
    ) -> None:
        self.directory, self.image, self.provider, self.id = directory, image, provider, id
        self.name = f"fht{os.getpid()}x{number}"
        self.cable = f"fhv{os.getpid() % 100000}x{number}"
        # Several runs share a machine: the addresses are this process's own.
        third = os.getpid() % 64 * 4 + number
        self.ip, self.outside = f"10.214.{third}.2", f"10.214.{third}.1"
        self.state, self.config, self.console = directory / "state", directory / "config", directory / "console"
        self.process: subprocess.Popen[bytes] | None = None

    def plug_in(self) -> None:
        self.connect()
        self.tool("init", "--id", self.id, "--external-ip", self.ip)

    def connect(self) -> None:
        """Make the namespace and the cable."""
        cable = self.cable
        for command in (
            f"ip netns add {self.name}",
            f"ip -n {self.name} link set lo up",
            f"ip link add {cable} type veth peer name eth0 netns {self.name}",
            f"ip addr add {self.outside}/24 dev {cable}",
            f"ip link set {cable} up",
            f"ip -n {self.name} addr add {self.ip}/24 dev eth0",
            f"ip -n {self.name} link set eth0 up",
        ):
            subprocess.check_call(command.split())

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", str(BIN / "flynn-host"), *arguments]

    def tool(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run flynn-host as if logged in on the node."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=check, timeout=60
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "FLYNN_STATE_DIR": str(self.state),
            "FLYNN_CONFIG_DIR": str(self.config),
            "DISCOVERD": f"{self.ip}:1",
        }

    def start(self, *flags: str, env: Mapping[str, str] | None = None) -> None:
        with self.console.open("ab") as console:
            self.process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL", "--",
                    "nsenter", f"--net=/run/netns/{self.name}", str(BIN / "flynn-host"), "daemon",
                    "--log-dir", str(self.directory / "log"), "--vol-provider", self.provider,
                    "--zpool-name", self.name, "--cgroup-root", self.name, "--bridge-name", self.name[:15], *flags,
                ],
                env={**self.environment, **(env or {})}, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 20
        while "msg=ready" not in self.console.read_text()[self._seen() :]:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the daemon does not start:\n{self.console.read_text()}")
            time.sleep(0.05)

    def _seen(self) -> int:
        """Where the console began at the last start."""
        return getattr(self, "_console_start", 0)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the daemon, nothing else."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)
        self._console_start = len(self.console.read_text())

    @staticmethod
    def children(pid: int) -> list[str]:
        """The names of a process's children."""
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sorted(Path(f"/proc/{child}/comm").read_text().strip() for child in listed)

    @staticmethod
    def root_of(pid: int | None) -> Path:
        """The root directory of a container, given its init."""
        return Path(f"/proc/{pid}/root")

    def kill_containers(self) -> None:
        """What a power cut does to the jobs."""
        for procs in Path("/sys/fs/cgroup").glob(f"*/{self.name}/*/*/cgroup.procs"):
            for pid in procs.read_text().split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def remove(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(p.read_text() for p in Path("/sys/fs/cgroup").glob(f"*/{self.name}/*/*/cgroup.procs")):
            self.kill_containers()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if self.provider == "zfs":
            remove_pool(self.name)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", line.split()[4]], check=False)
        remove_cgroups(self.name)
        subprocess.run(["ip", "link", "del", self.cable], check=False)
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[HostClient]:
        """The host's API as another host sees it: TLS and a certificate."""
        identity = Identity.load(self.state / "identity")
        async with HttpClient(f"https://{self.ip}:1113", tls=identity) as http:
            yield HostClient(http)

    async def configure(self, host: HostClient) -> None:
        """Be flannel and discoverd."""
        await host.configure_network(NetworkConfig(subnet="100.102.7.1/24", mtu=1400, network="100.102.0.0/16"))
        await host.configure_discoverd(DiscoverdConfig(url=f"{self.ip}:1111", dns="100.102.7.1:53"))


def pools() -> list[str]:
    try:
        listing = ["zpool", "list", "-H", "-o", "name"]
        return subprocess.run(listing, check=False, capture_output=True, text=True, timeout=30).stdout.split()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []


def remove_pool(name: str) -> None:
    """Destroy a pool, if there is one. zfs-fuse lets go of file systems late, and a pool without its file haunts it."""
    for _ in range(100):
        try:
            done = subprocess.run(
                ["zpool", "destroy", "-f", name], check=False, capture_output=True, text=True, timeout=30
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return
        if "busy" not in done.stderr:
            return
        time.sleep(0.3)


def remove_cgroups(name: str) -> None:
    """Their processes may still be being reaped."""
    for directory in sorted(Path("/sys/fs/cgroup").glob(f"*/{name}/**/"), reverse=True):
        for _ in range(50):
            try:
                directory.rmdir()
                break
            except OSError:
                time.sleep(0.02)


def sweep() -> None:
    """Take away what test runs have left that were killed: namespaces, processes in them, cgroups, pools."""
    for name in pools():
        owner = name.removeprefix("fht").partition("x")[0]
        if name.startswith("fht") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            remove_pool(name)
    for namespace in Path("/run/netns").glob("fht*x*"):
        owner = namespace.name.removeprefix("fht").partition("x")[0]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        listed = subprocess.run(["ip", "netns", "pids", namespace.name], capture_output=True, text=True, check=False)
        procs = [path.read_text() for path in Path("/sys/fs/cgroup").glob(f"*/{namespace.name}/*/*/cgroup.procs")]
        for pid in {*listed.stdout.split(), *" ".join(procs).split()}:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        subprocess.run(["ip", "netns", "del", namespace.name], check=False)
        remove_cgroups(namespace.name)


def busybox_root(root: Path) -> None:
    """Make the files of a small system: busybox with a link per applet, root and web as users."""
    for directory in ("bin", "etc", "tmp", "proc", "sys", "dev"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", root / "bin/busybox")
    for applet in subprocess.check_output(["/usr/bin/busybox", "--list"], text=True).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")


def busybox_image(work: Path, files: Mapping[str, bytes] | None = None) -> Mountspec:
    """A layer with busybox, a link per applet and some more files; `work/root` has the same as a directory."""
    root = work / "root"
    busybox_root(root)
    for name, content in (files or {}).items():
        (root / name).write_bytes(content)
    file = work / "busybox.squashfs"
    subprocess.check_call(["mksquashfs", root, file, "-quiet", "-no-progress", "-noappend"], stdout=subprocess.DEVNULL)
    content = file.read_bytes()
    return Mountspec(
        type="squashfs",
        id="busybox",
        url=f"file://{file}",
        size=len(content),
        hashes={"sha256": hashlib.sha256(content).hexdigest()},
    )


async def ended(host: HostClient, job_id: str, seconds: float = 20) -> JobStatus:
    """Wait until a job is down."""
    async with asyncio.timeout(seconds):
        while not (job := await host.job(job_id)).status.down:
            await asyncio.sleep(0.05)
    return job.status


async def run_to_end(host: HostClient, job: HostJob) -> list[JobEvent]:
    """Run a job and return all its events."""
    events: list[JobEvent] = []
    async with asyncio.timeout(30), host.subscribed(job.id) as stream:
        await host.add_job(job)
        async for event in stream:
            events.append(event)
            if event.event is JobEventKind.CLEANUP:
                return events
    raise AssertionError("the stream ended")


async def eventually(condition: object, seconds: float = 15) -> None:
    """Wait for an async condition."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                if await condition():  # type: ignore[operator]
                    return
            except ApiError:
                pass
            await asyncio.sleep(0.05)
