"""Inits are as old as their containers: what daemon and init say to each other may grow, but not change."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flynn.host.runtime import init
from flynn.host.runtime.runtime import Container, Exit, Runtime, State
from flynn.host.runtime.spec import ContainerSpec, Limits, Network, RootFS, from_json, protocol_of, to_json

from .conftest import read, started

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: An init of protocol 1, as daemons of before the protocol had a number have left it; and one of a protocol to come.
INIT = """
import array, os, socket, sys
directory, era = sys.argv[1:]
os.chdir(directory)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind("init.sock")
listener.listen(4)
print("up", flush=True)
(out, out_end), (err, err_end) = os.pipe(), os.pipe()
os.write(out_end, b"from an old time")
connection, _ = listener.accept()
names, fds = "stdout,stderr", [out, err]
if era == "future":
    connection.send(b"protocol 9")
    connection.send(b"weather fine")
    names, fds = "stdout,weather,stderr", [out, os.dup(0), err]
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
connection.sendmsg([f"hello {names} created".encode()], rights)
while words := connection.recv(4096).decode().split():
    if words == ["resume"]:
        connection.send(b"running")
        connection.send(b"oom 1")
    elif words == ["signal", "15"]:
        open("exit", "w").write("exited 143 15 1")
        connection.send(b"exited 143 15 1")
        os._exit(0)
"""


@pytest.mark.parametrize(("era", "protocol"), [("past", 1), ("future", 9)])
async def test_this_daemon_and_inits_of_other_versions(
    runtime: Runtime, tmp_path: Path, era: str, protocol: int
) -> None:
    directory = tmp_path / "jobs" / "h-1"
    directory.mkdir(parents=True)
    spec = ContainerSpec(id="h-1", directory=str(directory), args=("x",), rootfs=RootFS(lower=("/l",)))
    (directory / "spec.json").write_text(to_json(spec, protocol))
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INIT, str(directory), era), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert other.stdout is not None and await other.stdout.readline() == b"up\n"
        container = await runtime.reconnect(directory)
        assert (container.state, container.protocol, container.pid) == (State.CREATED, protocol, other.pid)
        async with asyncio.timeout(10):
            await container.resume()
            assert await anext(container.oom_kills()) == 1
            await container.signal(15)
            assert await container.wait() == Exit(143, 15, oom=True)
        assert await read(container.stdout) == "from an old time"
        container.close()
    finally:
        if other.returncode is None:
            other.kill()
        await other.wait()


async def test_this_init_and_a_daemon_of_before(runtime: Runtime, spec: Callable[..., ContainerSpec]) -> None:
    """The conversation as protocol 1 has it, byte by byte; what came since stands before it and is not asked for."""
    container = await started(runtime, spec("echo hello; trap 'exit 3' USR1; while true; do sleep 0.1; done"))
    connection = _connected(container)
    try:
        assert connection.recv(100) == b"protocol %d" % init.PROTOCOL
        message, ancillary, _, _ = connection.recvmsg(100, socket.CMSG_SPACE(16))
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        assert (message, len(fds)) == (b"hello stdout,stderr running", 2)
        assert await read_some(fds[0]) == b"hello\n"
        connection.send(b"weather please")  # of a daemon to come
        connection.send(b"signal 10")
        assert connection.recv(100) == b"exited 3 0 0"
        assert connection.recv(100) == b""
        for fd in fds:
            os.close(fd)
    finally:
        connection.close()
    async with asyncio.timeout(5):
        assert (await container.wait()).code == 3
    await container.destroy()


async def read_some(fd: int) -> bytes:
    async with asyncio.timeout(5):
        while True:
            try:
                return os.read(fd, 100)
            except BlockingIOError:
                await asyncio.sleep(0.01)


def _connected(container: Container) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5)
    fd = os.open(container.directory, os.O_DIRECTORY)
    connection.connect(f"/proc/self/fd/{fd}/{init.SOCKET}")
    os.close(fd)
    return connection


def test_specs_of_other_versions_are_understood() -> None:
    network = Network(bridge="b", address="100.64.0.2", prefix=24, gateway="100.64.0.1")
    spec = ContainerSpec(
        id="h-1", directory="/d", args=("a",), rootfs=RootFS(lower=("/l",)), network=network, limits=Limits(pids=5)
    )
    text = to_json(spec, 2)
    assert (from_json(text), protocol_of(text)) == (spec, 2)

    newer: dict[str, Any] = json.loads(text)
    newer["colour"] = "red"
    for part in ("rootfs", "network", "limits"):
        newer[part]["colour"] = "red"
    for device in newer["devices_created"]:
        device["colour"] = "red"
    assert from_json(json.dumps(newer)) == spec

    older = {key: value for key, value in json.loads(text).items() if key in ("id", "directory", "args", "rootfs")}
    assert from_json(json.dumps(older)) == ContainerSpec(
        id="h-1", directory="/d", args=("a",), rootfs=RootFS(lower=("/l",))
    )
    assert protocol_of(json.dumps(older)) == 1
