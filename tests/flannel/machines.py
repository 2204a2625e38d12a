"""Machines for tests: network namespaces on one bridge, each with real processes in it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from flynn.identity.authority import ClusterCA
from flynn.types.codec import decode
from flynn.types.host import HostStatus

PREFIX = f"fl{os.getpid() % 100000}"


def ip(*arguments: str, netns: str = "") -> str:
    command = ["ip", *(["-n", netns] if netns else []), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Machine:
    """One namespace. `address` is its external IP on the common bridge, `output` where the processes' logs go."""

    output: int | None = None

    def __init__(self, number: int, directory: Path, ca: ClusterCA) -> None:
        self.number = number
        self.netns = f"{PREFIX}m{number}"
        self.switch = f"{PREFIX}sw"
        self.address = f"10.66.0.{number}"
        self.directory = directory / f"machine{number}"
        self.directory.mkdir()
        self._status_file = self.directory / "status.json"
        for service in ("discoverd", "flannel"):
            ca.issue_job(service, "app", service, [self.address]).write(self.directory / service)

    @asynccontextmanager
    async def process(
        self, module: str, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", self.netns, sys.executable, "-m", module, *arguments,
            env={"PATH": os.environ["PATH"], "EXTERNAL_IP": self.address, "PYTHONPATH": os.getcwd(), **(environ or {})},
            stdout=self.output,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()

    def discoverd(self):  # type: ignore[no-untyped-def]
        return self.process(
            "flynn.discoverd.main", "-data-dir", str(self.directory / "data"),
            environ={"FLYNN_IDENTITY": str(self.directory / "discoverd")},
        )  # fmt: skip

    def host(self):  # type: ignore[no-untyped-def]
        return self.process(
            "tests.discoverd.fakehost", str(self.directory / "flannel"), self.address, str(self._status_file)
        )

    def flannel(self, discoverd: str, **environ: str):  # type: ignore[no-untyped-def]
        return self.process(
            "flynn.flannel.main", "-subnet-file", str(self.directory / "subnet.env"),
            environ={
                "FLYNN_IDENTITY": str(self.directory / "flannel"),
                "FLYNN_HOST_ID": self.netns,
                "FLYNN_JOB_ID": f"{self.netns}-flannel",
                "DISCOVERD": f"{discoverd}:1111",
                "PORT": "5002",
                **environ,
            },
        )  # fmt: skip

    def status(self) -> HostStatus:
        """What the fake host of this machine has been told."""
        return decode(self._status_file.read_bytes(), HostStatus) if self._status_file.exists() else HostStatus()

    async def subnet(self) -> str:
        """The bridge address flannel has chosen, once it has told the host."""
        async with asyncio.timeout(20):
            while (network := self.status().network) is None:
                await asyncio.sleep(0.05)
        return network.subnet

    def make_bridge(self, subnet: str) -> None:
        """What flynn-host does with a subnet, as far as routing is concerned."""
        ip("link", "add", "br0", "type", "bridge", netns=self.netns)
        ip("addr", "add", subnet, "dev", "br0", netns=self.netns)
        ip("link", "set", "br0", "up", netns=self.netns)

    def move(self, address: str, ca: ClusterCA) -> None:
        """Give the machine another address, as somebody who renumbers a network does."""
        ip("addr", "del", f"{self.address}/24", "dev", "eth0", netns=self.netns)
        ip("addr", "add", f"{address}/24", "dev", "eth0", netns=self.netns)
        self.address = address
        for service in ("discoverd", "flannel"):
            ca.issue_job(service, "app", service, [address]).write(self.directory / service)

    @asynccontextmanager
    async def echo(self, address: str) -> AsyncIterator[None]:
        """Send back every datagram that comes to an address of this machine."""
        process = await self._python(ECHO, address, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(10):
            await process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
            await process.wait()

    @asynccontextmanager
    async def stream(self, source: str, to: str) -> AsyncIterator[Stream]:
        """A datagram every 5 ms to somebody who echoes it."""
        process = await self._python(
            STREAM, source, to, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE
        )  # fmt: skip
        stream = Stream(process)
        try:
            await stream.flowing()
            yield stream
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _python(self, script: str, *arguments: str, **streams: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", self.netns, sys.executable, "-S", "-E", "-u", "-c", script, *arguments, **streams  # type: ignore[arg-type]
        )  # fmt: skip

    def cut(self) -> None:
        """Unplug the machine: nothing goes in or out, and nobody is told."""
        ip("link", "set", f"p{self.number}", "down", netns=self.switch)

    def mend(self) -> None:
        ip("link", "set", f"p{self.number}", "up", netns=self.switch)

    def shows(self, *arguments: str) -> list[str]:
        return [" ".join(line.split()) for line in ip(*arguments, netns=self.netns).splitlines()]

    def run(self, *command: str) -> str:
        inside = ["ip", "netns", "exec", self.netns, *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout

    def fdb(self) -> list[str]:
        return self.run("bridge", "fdb", "show", "dev", "flannel.1").splitlines()

    def replace_interface(self) -> None:
        """Take the interface to the others away and bring another one of the same name and address."""
        ip("link", "del", "eth0", netns=self.netns)
        plug(self)

    async def reaches(self, address: str, source: str) -> bool:
        """Whether packets go there and come back: a closed port that refuses is an answer, too."""
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", self.netns, sys.executable, "-S", "-E", "-c", KNOCK, address, source
        )  # fmt: skip
        return await process.wait() == 0


class Stream:
    """Datagrams under way between two machines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def flowing(self) -> None:
        """Returns when the first ones have come back; what got lost before does not count."""
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            assert await self._process.stdout.readline() == b"flowing\n"

    async def ended(self) -> tuple[int, int]:
        """How many were sent, and how many of these did not come back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        async with asyncio.timeout(10):
            sent, lost = (await self._process.stdout.readline()).split()
        return int(sent), int(lost)


ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 7))
print("ready")
while True:
    data, peer = s.recvfrom(2000)
    s.sendto(data, peer)
"""
STREAM = """
import select, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 0)); s.connect((sys.argv[2], 7))
s.setblocking(False)
sent, back, flowing, end, due = 0, set(), False, None, time.monotonic()
while end is None or time.monotonic() < end:
    if end is None and time.monotonic() >= due:
        sent, due = sent + 1, due + 0.005
        try: s.send(b"%8d" % sent + b"." * 1000)
        except OSError: pass
    ready, _, _ = select.select([s, sys.stdin] if end is None else [s], [], [], 0.005)
    if s in ready:
        try:
            while True: back.add(int(s.recv(2000)[:8]))
        except OSError: pass
    if not flowing and len(back) > 20:
        flowing = True
        sent, back = 0, set()
        print("flowing", flush=True)
    if sys.stdin in ready and end is None: end = time.monotonic() + 1
print(sent, len(set(range(1, sent + 1)) - back), flush=True)
"""
KNOCK = """
import socket, sys
s = socket.socket(); s.settimeout(1); s.bind((sys.argv[2], 0))
try: s.connect((sys.argv[1], 9))
except ConnectionRefusedError: sys.exit(0)
except OSError: sys.exit(1)
"""


def plug(machine: Machine) -> None:
    """Connect a machine to the switch."""
    port = f"p{machine.number}"
    ip(
        "link", "add", port, "netns", machine.switch, "type", "veth", "peer", "name", "eth0", "netns", machine.netns
    )  # fmt: skip
    ip("link", "set", port, "master", "sw0", "up", netns=machine.switch)
    ip("addr", "add", f"{machine.address}/24", "dev", "eth0", netns=machine.netns)
    ip("link", "set", "eth0", "up", netns=machine.netns)


def switch_address() -> str:
    """Of the switch itself: who runs in its namespace reaches all machines."""
    return "10.66.0.254"


@asynccontextmanager
async def machines(count: int, directory: Path, ca: ClusterCA) -> AsyncIterator[list[Machine]]:
    """`count` machines that see each other; everything made is removed again."""
    switch = f"{PREFIX}sw"
    async with AsyncExitStack() as undo:
        ip("netns", "add", switch)
        undo.callback(ip, "netns", "del", switch)
        ip("link", "add", "name", "sw0", "type", "bridge", netns=switch)
        ip("link", "set", "sw0", "up", netns=switch)
        ip("link", "set", "lo", "up", netns=switch)
        ip("addr", "add", f"{switch_address()}/24", "dev", "sw0", netns=switch)
        made = []
        for number in range(1, count + 1):
            machine = Machine(number, directory, ca)
            ip("netns", "add", machine.netns)
            undo.callback(ip, "netns", "del", machine.netns)
            ip("link", "set", "lo", "up", netns=machine.netns)
            plug(machine)
            made.append(machine)
        yield made
