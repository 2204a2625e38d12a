"""A real HAProxy on loopback, and backends whose every byte a test decides."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flynn.router.haproxy import Haproxy
from flynn.router.launcher import haproxy_command
from flynn.router.paths import Paths
from flynn.router.render import Settings, render
from flynn.router.table import Certificate, RoutingState, ServiceState, build
from flynn.types.instance import Instance
from flynn.types.route import Route

COOKIE_KEY = bytes(range(32))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_pair(name: str) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), pem.decode()


@dataclass
class Head:
    """The first lines of a request as a backend got them."""

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes


Answer = Callable[["Backend", Head, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]
"""Answers one request; False closes the connection."""


async def echo_name(backend: Backend, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    length = int(head.headers.get("content-length", "0"))
    if length:
        await reader.readexactly(length)
    body = backend.name.encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    return True


@dataclass
class Backend:
    name: str
    answer: Answer = echo_name
    port: int = 0
    heads: list[Head] = field(default_factory=list)
    connections: int = 0
    tls: object = None
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def instance(self) -> Instance:
        proto = "https" if self.tls else "http"
        return Instance.at(
            f"127.0.0.1:{self.port}", proto, {"FLYNN_APP_NAME": "shop", "FLYNN_JOB_ID": f"host-{self.name}"}
        )

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)  # type: ignore[arg-type]
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                raw = await reader.readuntil(b"\r\n\r\n")
                first, *lines = raw.decode("latin-1").strip().split("\r\n")
                method, target, _ = first.split(" ", 2)
                headers: dict[str, str] = {}
                for line in lines:
                    name, _, value = line.partition(":")
                    name = name.lower()
                    headers[name] = f"{headers[name]}|{value.strip()}" if name in headers else value.strip()
                head = Head(method, target, headers, raw)
                self.heads.append(head)
                if not await self.answer(self, head, reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # asyncio.streams complains about a cancelled connection; this one ends with its test
        finally:
            self._tasks.discard(task)
            writer.close()


@dataclass
class Router:
    """HAProxy as the daemon runs it, without the daemon."""

    haproxy: Haproxy
    settings: Settings
    routes: list[Route] = field(default_factory=list)
    services: dict[str, ServiceState] = field(default_factory=dict)

    @property
    def state(self) -> RoutingState:
        return build(self.routes, self.services, additional_ports=frozenset(self.settings.additional_http_ports))

    async def apply(self) -> None:
        await self.haproxy.apply(render(self.state, self.settings))

    async def serve(self, service: str, *backends: Backend, leader: Backend | None = None) -> None:
        self.services[service] = ServiceState(
            tuple(backend.instance for backend in backends), leader.instance if leader else None
        )
        await self.apply()

    async def ask(
        self, host: str, path: str = "/", *, method: str = "GET", headers: str = "", body: bytes = b"", port: int = 0
    ) -> Reply:
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.settings.http_port)
        try:
            length = f"Content-Length: {len(body)}\r\n" if body else ""
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}{length}\r\n".encode() + body)
            return await Reply.read(reader)
        finally:
            writer.close()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Reply:
        async with asyncio.timeout(10):
            raw = await reader.readuntil(b"\r\n\r\n")
            first, *lines = raw.decode("latin-1").strip().split("\r\n")
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            return cls(int(first.split(" ")[1]), headers, body)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: the path of a UNIX socket has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="fr-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def default_pair() -> Certificate:
    return Certificate("".join(make_pair("default.example")))


@asynccontextmanager
async def launched(paths: Paths) -> AsyncIterator[None]:
    """Do what the launcher does for HAProxy."""
    process: asyncio.subprocess.Process | None = None

    async def start_when_configured() -> None:
        nonlocal process
        while not paths.config.exists():
            await asyncio.sleep(0.02)
        process = await asyncio.create_subprocess_exec(*haproxy_command(paths.config, paths.master))

    paths.create()
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(start_when_configured())
        try:
            yield
        finally:
            starting.cancel()
            if process is not None:
                with suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()


@pytest.fixture
async def router(directory: Path, default_pair: Certificate) -> AsyncIterator[Router]:
    settings = Settings(
        listen_ip="127.0.0.1",
        http_port=free_port(),
        https_port=free_port(),
        additional_http_ports=(free_port(),),
        default_pair=default_pair,
        cookie_key=COOKIE_KEY,
        max_connections=500,
    )
    paths = Paths(directory / "state", directory / "run")
    async with launched(paths):
        yield Router(Haproxy(paths), settings)


@pytest.fixture
async def backend() -> AsyncIterator[Callable[..., Awaitable[Backend]]]:
    """Makes backends: `await backend("a")`, or with an answer of its own."""
    made: list[Backend] = []

    async def make(name: str, answer: Answer = echo_name, tls: object = None) -> Backend:
        one = Backend(name, answer, tls=tls)
        await one.start()
        made.append(one)
        return one

    yield make
    for one in made:
        await one.stop()
