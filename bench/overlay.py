"""The overlay beside the wire under it: TCP and round trips between containers of two nodes with real flannel daemons.

The nodes are network namespaces on one bridge, each with a container's namespace behind its own bridge, as flynn-host
makes them. The peer is the same traffic between the nodes' own addresses: what VXLAN and one more hop cost.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row, table
from flynn.host.runtime import kernel
from flynn.identity.authority import ClusterCA
from tests.flannel.machines import Machine, ip, machines

ROUNDS = 3  # taken in turns
SECONDS = 3
ECHOES = 4000
PORT = 5201
LIMIT = 40.0
MTU = 1450  # what VXLAN leaves


@dataclass(frozen=True, slots=True)
class End:
    """An address and the namespace it is in."""

    netns: str
    address: str


def rows() -> list[Row]:
    work = Path(tempfile.mkdtemp(prefix="flynn-bench-"))
    try:
        return asyncio.run(_measure(work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _measure(work: Path) -> list[Row]:
    async with machines(2, work, ClusterCA.create()) as (one, two), AsyncExitStack() as stack:
        one.output = two.output = subprocess.DEVNULL
        await stack.enter_async_context(one.discoverd())  # type: ignore[no-untyped-call]
        for machine in (one, two):
            await stack.enter_async_context(machine.host())  # type: ignore[no-untyped-call]
            await stack.enter_async_context(machine.flannel(one.address))
        ends = [await stack.enter_async_context(_container(machine)) for machine in (one, two)]
        overlay = (ends[0], ends[1])
        wire = (End(one.netns, one.address), End(two.netns, two.address))
        async with asyncio.timeout(LIMIT):
            while not await asyncio.to_thread(_reaches, *overlay):
                await asyncio.sleep(0.1)
        rates: dict[bool, list[float]] = {True: [], False: []}
        trips: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for through, pair in ((True, overlay), (False, wire)):
                rates[through].append(await asyncio.to_thread(_throughput, *pair))
                trips[through].append(await asyncio.to_thread(_round_trip, *pair))
    against = "veth, same nodes"
    return [
        Row(
            name="overlay: TCP between containers of two nodes", ours=statistics.median(rates[True]),
            peer=statistics.median(rates[False]), unit="Gbit/s", against=against,
        ),
        Row(
            name="overlay: round trip of a UDP packet, p50", ours=statistics.median(trips[True]),
            peer=statistics.median(trips[False]), unit="us", against=against,
        ),
    ]  # fmt: skip


@asynccontextmanager
async def _container(machine: Machine) -> AsyncIterator[End]:
    """A namespace on the machine's bridge, with the MTU of a job."""
    bridge = await machine.subnet()
    machine.make_bridge(bridge)
    end = End(f"{machine.netns}c", f"{bridge.split('/')[0].rsplit('.', 1)[0]}.7")
    ip("netns", "add", end.netns)
    try:
        ip("link", "add", "c0", "type", "veth", "peer", "name", "eth0", "netns", end.netns, netns=machine.netns)
        ip("link", "set", "c0", "master", "br0", "up", "mtu", str(MTU), netns=machine.netns)
        ip("addr", "add", f"{end.address}/24", "dev", "eth0", netns=end.netns)
        ip("link", "set", "eth0", "up", "mtu", str(MTU), netns=end.netns)
        ip("route", "add", "default", "via", bridge.split("/")[0], netns=end.netns)
        _in(machine.netns, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield end
    finally:
        ip("netns", "del", end.netns)


def _in(netns: str, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", netns, *command], check=True, capture_output=True)


def _reaches(here: End, there: End) -> bool:
    """Packets go there and come back: a closed port that refuses is an answer."""
    with _socket_in(here.netns, socket.SOCK_STREAM) as knocking:
        try:
            knocking.connect((there.address, 9))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    raise RuntimeError("somebody listens on the discard port")


def _throughput(here: End, there: End) -> float:
    """Gbit/s of one TCP connection."""
    server = subprocess.Popen(
        ["ip", "netns", "exec", there.netns, "iperf3", "--server", "--one-off", "--bind", there.address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    command = ["ip", "netns", "exec", here.netns, "iperf3", "--client", there.address, "--json", "-t", str(SECONDS)]
    try:
        deadline = time.monotonic() + LIMIT
        while True:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT)
            with suppress(ValueError, KeyError):
                return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
            if time.monotonic() > deadline:
                raise RuntimeError(f"iperf3 fails: {done.stdout[-500:]}")
            time.sleep(0.1)  # the server has not come to listening yet
    finally:
        server.terminate()
        server.wait()


def _round_trip(here: End, there: End) -> float:
    """Microseconds for a small packet there and back, median; one at a time."""
    with _socket_in(there.netns) as server, _socket_in(here.netns) as client:
        server.bind((there.address, PORT))
        stop = threading.Event()

        def echo() -> None:
            while not stop.is_set():
                try:
                    packet, sender = server.recvfrom(100)
                except TimeoutError:
                    continue
                server.sendto(packet, sender)

        echoing = threading.Thread(target=echo)
        echoing.start()
        try:
            client.connect((there.address, PORT))
            return statistics.median(_timed(lambda: (client.send(b"ping"), client.recv(100)), ECHOES))
        finally:
            stop.set()
            echoing.join()


def _timed(act: Callable[[], object], times: int) -> list[float]:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        took.append((time.perf_counter() - begin) * 1e6)
    return took


@contextmanager
def _socket_in(netns: str, kind: socket.SocketKind = socket.SOCK_DGRAM) -> Iterator[socket.socket]:
    """A socket that lives in another network namespace, made by a thread that has gone there."""
    made: list[socket.socket] = []

    def make() -> None:
        with Path(f"/run/netns/{netns}").open() as namespace:
            kernel.setns(namespace.fileno(), kernel.CLONE_NEWNET)
        made.append(socket.socket(socket.AF_INET, kind))

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    with made[0] as found:
        found.settimeout(1)
        yield found


if __name__ == "__main__":
    print(table(rows()))
