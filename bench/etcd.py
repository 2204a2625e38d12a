"""The peer of discoverd: three etcd members on loopback with TLS, and the few calls of its API that are measured.

Messages are put together and taken apart by hand: four of them, against a generated module per version of protobuf.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it would say at every child process that it cannot help

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]

from flynn.identity.authority import ClusterCA

CLIENT_PORT, PEER_PORT = 2379, 2380
START_SECONDS = 30.0

Refused: type[Exception] = grpc.aio.AioRpcError

Call = Any  # grpc has no types


class Cluster:
    """Three members, each of which can be killed and started again. Heartbeat 100 ms and election 1 s by default."""

    def __init__(self, directory: Path, addresses: Sequence[str], ca: ClusterCA) -> None:
        self.addresses, self._directory = addresses, directory
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        for address in addresses:
            ca.issue_job("etcd", "app", "etcd", [address]).write(directory / address)
        self._credentials = grpc.ssl_channel_credentials(
            *((directory / addresses[0] / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
        )

    async def start(self, address: str) -> None:
        """Returns when the member answers reads that need a majority."""
        own, members = self._directory / address, ",".join(f"{a}=https://{a}:{PEER_PORT}" for a in self.addresses)
        files = {"cert-file": own / "cert.pem", "key-file": own / "key.pem", "trusted-ca-file": own / "ca.pem"}
        flags = {
            "name": address, "data-dir": own / "data", "log-level": "error", "logger": "zap",
            "listen-client-urls": f"https://{address}:{CLIENT_PORT}",
            "advertise-client-urls": f"https://{address}:{CLIENT_PORT}",
            "listen-peer-urls": f"https://{address}:{PEER_PORT}",
            "initial-advertise-peer-urls": f"https://{address}:{PEER_PORT}",
            "initial-cluster": members, "initial-cluster-state": "new",
            **files, **{f"peer-{name}": file for name, file in files.items()},
        }  # fmt: skip
        self._processes[address] = await asyncio.create_subprocess_exec(
            "etcd", *(f"--{name}={value}" for name, value in flags.items()), "--client-cert-auth",
            "--peer-client-cert-auth", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
        )  # fmt: skip

    async def kill(self, address: str) -> None:
        process = self._processes.pop(address)
        process.kill()
        await process.wait()

    def client(self, address: str) -> Client:
        return Client(grpc.aio.secure_channel(f"{address}:{CLIENT_PORT}", self._credentials))

    async def answers(self, address: str) -> None:
        """Wait until a member takes part."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                async with self.client(address) as client:
                    try:
                        await client.get(b"is anybody there", timeout=2)
                        return
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)

    async def leader(self) -> str:
        ids: dict[str, tuple[int, int]] = {}
        async with asyncio.timeout(START_SECONDS):
            while True:
                for address in self._processes:
                    async with self.client(address) as client:
                        try:
                            ids[address] = await client.identity_and_leader()
                        except grpc.aio.AioRpcError:
                            continue
                for address, (identity, leader) in ids.items():
                    if identity == leader and address in self._processes:
                        return address
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        for address in list(self._processes):
            await self.kill(address)


@asynccontextmanager
async def running(directory: Path, addresses: Sequence[str], ca: ClusterCA) -> AsyncIterator[Cluster]:
    cluster = Cluster(directory, addresses, ca)
    try:
        for address in addresses:
            await cluster.start(address)
        for address in addresses:
            await cluster.answers(address)
        yield cluster
    finally:
        await cluster.close()


class Client:
    """One connection to one member."""

    def __init__(self, channel: Call) -> None:
        self._channel = channel
        self._put = channel.unary_unary("/etcdserverpb.KV/Put")
        self._range = channel.unary_unary("/etcdserverpb.KV/Range")
        self._delete = channel.unary_unary("/etcdserverpb.KV/DeleteRange")
        self._status = channel.unary_unary("/etcdserverpb.Maintenance/Status")
        self._watch = channel.stream_stream("/etcdserverpb.Watch/Watch")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close(None)

    async def put(self, key: bytes, value: bytes, *, timeout: float = 10) -> None:
        await self._put(_field(1, key) + _field(2, value), timeout=timeout)

    async def get(self, key: bytes, *, timeout: float = 10) -> None:
        await self._range(_field(1, key), timeout=timeout)

    async def delete(self, key: bytes, *, timeout: float = 10) -> None:
        await self._delete(_field(1, key), timeout=timeout)

    async def identity_and_leader(self) -> tuple[int, int]:
        fields = dict(_fields(await self._status(b"", timeout=2)))
        return dict(_fields(fields[1]))[2], fields.get(4, 0)

    async def watch(self, prefix: bytes) -> AsyncIterator[bytes | None]:
        """Yield None once the watch stands, then each key that was written or removed."""
        call = self._watch()
        end = prefix[:-1] + bytes([prefix[-1] + 1])
        await call.write(_field(1, _field(1, prefix) + _field(2, end)))
        async for message in call:
            for number, value in _fields(message):
                if number == 3 and value:
                    yield None
                elif number == 11:
                    yield dict(_fields(dict(_fields(value))[2]))[1]


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(message):
        key, position = _number(message, position)
        value, position = _number(message, position)
        if key & 7 == 2:
            yield key >> 3, message[position : position + value]
            position += value
        else:
            yield key >> 3, value


def _number(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
