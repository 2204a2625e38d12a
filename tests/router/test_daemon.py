"""The whole router: its processes beside a real discoverd and a controller that only knows routes."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flynn.aio.broadcast import Broadcast
from flynn.discoverd.client import Discoverd
from flynn.http.client import HttpClient
from flynn.http.server import Api, EventStream, Request, listen
from flynn.identity import Identity
from flynn.identity.access import access
from flynn.identity.authority import ClusterCA
from flynn.router.client import Router, RouterEventKind
from flynn.types.event import Event
from flynn.types.instance import Instance
from flynn.types.route import Certificate, Route
from tests.discoverd.harness import Place, loopback_address, member
from tests.router.conftest import Backend, Head, Reply, free_port, make_pair

pytestmark = pytest.mark.slow

Make = Callable[..., Awaitable[Backend]]


@dataclass
class RouteTable:
    """The part of the controller that a router talks to."""

    routes: dict[str, Route] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    changes: Broadcast[Event] = field(default_factory=Broadcast)

    def put(self, route: Route) -> None:
        self.routes[route.id] = route
        self._tell("route", route)

    def remove(self, route_id: str) -> None:
        self._tell("route_deletion", self.routes.pop(route_id))

    def _tell(self, kind: str, route: Route) -> None:
        self.events.append(Event(id=len(self.events) + 1, object_type=kind, object_id=route.id))
        self.changes.send(self.events[-1])

    def api(self) -> Api:
        async def routes(request: Request) -> list[Route]:
            return list(self.routes.values())

        async def events(request: Request) -> list[Event] | EventStream:
            if request.accepts_events:
                return EventStream(follow(int(request.header("Last-Event-Id", "0") or 0)))
            return self.events[-1:]

        async def follow(after: int) -> AsyncIterator[Event]:
            async with self.changes.subscribe() as changes:
                for event in self.events[after:]:
                    yield event
                async for event in changes:
                    yield event

        api = Api("controller")
        api.route("GET", "/routes", routes, allow=access("app:router"))
        api.route("GET", "/events", events, allow=access("app:router"))
        return api


@dataclass
class Cluster:
    directory: Path
    ca: ClusterCA
    discoverd: Discoverd
    table: RouteTable
    environment: dict[str, str]
    http_port: int
    https_port: int
    api_port: int
    address: str
    process: asyncio.subprocess.Process | None = None

    def identity(self, app: str, service: str, *addresses: str) -> Identity:
        directory = self.directory / f"identity-{app}"
        self.ca.issue_job(app, "web", service, ["127.0.0.1", *addresses]).write(directory)
        return Identity.load(directory)

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flynn.router.main"),
            *("-http-port", str(self.http_port), "-https-port", str(self.https_port)),
            *("-tcp-range-start", "3000", "-tcp-range-end", "3500"),
            env=self.environment,
        )

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()

    async def get(self, host: str, path: str = "/") -> Reply:
        reader, writer = await asyncio.open_connection(self.address, self.http_port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return await Reply.read(reader)
        finally:
            writer.close()

    async def serves(self, host: str, status: int, limit: float = 20.0) -> Reply:
        async with asyncio.timeout(limit):
            while True:
                with suppress(OSError, asyncio.IncompleteReadError):
                    reply = await self.get(host)
                    if reply.status == status:
                        return reply
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def api(self) -> AsyncIterator[HttpClient]:
        identity = self.identity("scheduler", "controller-scheduler")
        async with HttpClient(f"https://{self.address}:{self.api_port}", tls=identity, timeout=5) as http:
            yield http

    def child_or_none(self, marker: str) -> int | None:
        try:
            return self.child(marker)
        except LookupError:
            return None

    def child(self, marker: str) -> int:
        """The pid of the launcher's child with this word in its command line."""
        assert self.process is not None
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if marker in Path(f"/proc/{child}/cmdline").read_bytes().decode():
                return int(child)
        raise LookupError(marker)


@pytest.fixture
async def cluster(directory: Path) -> AsyncIterator[Cluster]:
    ca = ClusterCA.create()
    address = loopback_address()
    ca.issue_job("router", "app", "router-api", [address]).write(directory / "identity")
    ca.issue_job("controller", "web", "controller", []).write(directory / "controller")
    table = RouteTable()
    cert, key = make_pair("example.test")
    http_port, https_port, api_port = free_port(), free_port(), free_port()
    place = Place(ca, directory / "discoverd")
    async with (
        member(place),
        place.client() as discoverd,
        listen(table.api(), "127.0.0.1", 0, tls=Identity.load(directory / "controller")) as (_, controller_port),
    ):
        cluster = Cluster(
            directory,
            ca,
            discoverd,
            table,
            {
                **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
                "COOKIE_KEY": base64.b64encode(bytes(32)).decode(),
                "TLSCERT": cert,
                "TLSKEY": key,
                "LISTEN_IP": address,
                "EXTERNAL_IP": address,
                "PORT": str(api_port),
                "DISCOVERD": place.http_address,
                "FLYNN_IDENTITY": str(directory / "identity"),
                "FLYNN_APP_NAME": "router",
                "FLYNN_JOB_ID": "host1-router",
                "CONTROLLER_KEY": "secret",
                "CONTROLLER_URL": f"https://127.0.0.1:{controller_port}",
                "ROUTER_STATE_DIR": str(directory / "state"),
                "ROUTER_RUN_DIR": str(directory / "run"),
            },
            http_port,
            https_port,
            api_port,
            address,
        )
        try:
            yield cluster
        finally:
            await cluster.stop()


def route(name: str, **rest: object) -> Route:
    return Route(type="http", id=name, service=f"{name}-web", domain=f"{name}.test", drain_backends=True, **rest)  # type: ignore[arg-type]


async def test_the_life_of_a_route(cluster: Cluster, backend: Make) -> None:
    one, two = await backend("one"), await backend("two")
    cluster.table.put(route("shop"))
    await cluster.discoverd.create("shop-web")
    await cluster.discoverd.register("shop-web", one.instance)
    await cluster.start()
    assert (await cluster.serves("shop.test", 200)).body == b"one"
    async with asyncio.timeout(10):
        while not (registered := await cluster.discoverd.instances("router-http")):
            await asyncio.sleep(0.05)
        assert registered[0].addr == f"{cluster.address}:{cluster.http_port}"
        assert registered[0].proto == "http"
        api = (await cluster.discoverd.instances("router-api"))[0]
        assert (api.addr, api.proto) == (f"{cluster.address}:{cluster.api_port}", "https")
        assert api.meta["FLYNN_JOB_ID"] == "host1-router"
    async with cluster.api() as http:
        kinds = [RouterEventKind.BACKEND_UP, RouterEventKind.BACKEND_DOWN, RouterEventKind.BACKEND_DRAINED]
        events = Router(http).events([*kinds, RouterEventKind.SET, RouterEventKind.REMOVE], replay_routes=True)
        async with asyncio.timeout(10):
            first, second = await anext(events), await anext(events)
            assert first.event == "set" and first.route is not None and first.route.service == "shop-web"
            assert second.event == "backend-up" and second.backend is not None
            assert (second.backend.job_id, second.backend.app) == ("host-one", "shop")

            # A new backend is announced when it serves, the old one when it no longer does.
            await cluster.discoverd.register("shop-web", two.instance)
            assert (await anext(events)).event == "backend-up"
            await cluster.discoverd.deregister("shop-web", one.instance.id)
            assert [(await anext(events)).event for _ in "12"] == ["backend-down", "backend-drained"]
            assert (await cluster.get("shop.test")).body == b"two"
            metrics = await http.call("GET", "/metrics", answer=bytes)
            assert metrics is not None and b'flynn_router_responses_total{service="shop-web",class="2xx"}' in metrics

            cluster.table.remove("shop")
            assert {(await anext(events)).event for _ in "12"} == {"remove", "backend-down"}
        assert (await cluster.get("shop.test")).status == 404
        status = await http.get("/.well-known/status", answer=dict)
        assert status["data"]["status"] == "healthy"


async def test_traffic_does_not_notice_that_the_daemon_was_killed(cluster: Cluster, backend: Make) -> None:
    one = await backend("one")
    cluster.table.put(route("shop"))
    cluster.table.put(route("late"))
    for service in ("shop-web", "late-web"):
        await cluster.discoverd.create(service)
    await cluster.discoverd.register("shop-web", one.instance)
    await cluster.start()
    await cluster.serves("shop.test", 200)
    worker = cluster.child("haproxy")
    killed = cluster.child("--control")
    os.kill(killed, signal.SIGKILL)
    await cluster.discoverd.register("late-web", one.instance)
    asked = 0
    async with asyncio.timeout(20):
        while (await cluster.get("late.test")).status != 200:
            assert (await cluster.get("shop.test")).status == 200
            asked += 1
            await asyncio.sleep(0.02)
    assert asked > 3
    assert cluster.child("--control") != killed
    assert cluster.child("haproxy") == worker


@pytest.mark.parametrize("victim", ["master", "worker"])
async def test_haproxy_comes_back_after_being_killed(cluster: Cluster, backend: Make, victim: str) -> None:
    one = await backend("one")
    cluster.table.put(route("shop"))
    await cluster.discoverd.create("shop-web")
    await cluster.discoverd.register("shop-web", one.instance)
    await cluster.start()
    await cluster.serves("shop.test", 200)
    pid = master = cluster.child("haproxy")
    if victim == "worker":
        pid = int(Path(f"/proc/{master}/task/{master}/children").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while master == cluster.child_or_none("haproxy"):
            await asyncio.sleep(0.05)
    await cluster.serves("shop.test", 200)
    # The control daemon goes on with the new one.
    cluster.table.put(route("late"))
    await cluster.serves("late.test", 503)


async def test_a_restart_serves_without_controller_and_discoverd(cluster: Cluster, backend: Make) -> None:
    one = await backend("one")
    cluster.table.put(route("shop"))
    await cluster.discoverd.create("shop-web")
    await cluster.discoverd.register("shop-web", one.instance)
    await cluster.start()
    await cluster.serves("shop.test", 200)
    await cluster.stop()
    cluster.environment |= {"CONTROLLER_URL": "https://127.0.0.1:1", "DISCOVERD": "127.0.0.1:1"}
    await cluster.start()
    assert (await cluster.serves("shop.test", 200)).body == b"one"


async def test_a_stop_lets_requests_finish(cluster: Cluster, backend: Make) -> None:
    release = asyncio.Event()

    async def slow(backend: Backend, head: Head, reader: object, writer: asyncio.StreamWriter) -> bool:
        if head.target == "/slow":
            await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return True

    one = await backend("one", slow)
    cluster.table.put(route("shop"))
    await cluster.discoverd.create("shop-web")
    await cluster.discoverd.register("shop-web", one.instance)
    await cluster.start()
    await cluster.serves("shop.test", 200)
    request = asyncio.ensure_future(cluster.get("shop.test", "/slow"))
    async with asyncio.timeout(20):
        while not await cluster.discoverd.instances("router-http"):
            await asyncio.sleep(0.05)
        while one.heads[-1].target != "/slow":
            await asyncio.sleep(0.01)
        assert cluster.process is not None
        cluster.process.send_signal(signal.SIGTERM)
        while await cluster.discoverd.instances("router-http"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        with pytest.raises(OSError):
            await cluster.get("shop.test")
        release.set()
        assert (await request).body == b"ok"
        assert await cluster.process.wait() == 0


async def test_bad_routes_and_certificates_harm_nobody(cluster: Cluster, backend: Make) -> None:
    one = await backend("one")
    taken = await asyncio.start_server(lambda r, w: None, cluster.address, 0)
    await cluster.discoverd.create("shop-web")
    await cluster.discoverd.register("shop-web", one.instance)
    cluster.table.put(route("broken", certificate=Certificate(cert="no certificate", key="no key")))
    cluster.table.put(route("shop"))
    await cluster.start()
    await cluster.serves("shop.test", 200)
    cluster.table.put(Route(type="tcp", id="taken", service="shop-web", port=taken.sockets[0].getsockname()[1]))
    cluster.table.put(Route(type="http", id="odd", service="shop-web", domain="bad domain"))
    cluster.table.put(Route(type="http", id="other", service="shop-web", domain="other.test"))
    assert (await cluster.serves("other.test", 200)).body == b"one"
    assert (await cluster.get("broken.test")).status == 503  # served, with the default certificate
    async with cluster.api() as http:
        problems = {item["route"]: item["reason"] for item in await http.get("/problems", answer=list[dict[str, str]])}
    assert problems.keys() == {"http/broken", "tcp/taken", "http/odd"}
    assert "in use" in problems["tcp/taken"]
    taken.close()


async def test_an_attach_reaches_the_controller_with_its_body(cluster: Cluster, backend: Make) -> None:
    """What `flynn run` does: POST with a body and an upgrade, over TLS to a daemon that wants a certificate."""
    seen: list[bytes] = []

    async def attach(backend: Backend, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if "upgrade" not in head.headers:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return True
        seen.append(await reader.readexactly(int(head.headers["content-length"])))
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: flynn-attach/0\r\n\r\nbehind"
        )
        while data := await reader.read(100):
            writer.write(data.upper())
        writer.write(b"bye")
        return False

    identity = cluster.identity("controller", "controller")
    daemon = await backend("controller", attach, tls=identity.server_context())
    cluster.table.put(Route(type="http", id="c", service="controller", domain="controller.test"))
    await cluster.discoverd.create("controller")
    await cluster.discoverd.register("controller", daemon.instance)
    await cluster.start()
    assert (await cluster.serves("controller.test", 200)).body == b"ok"
    assert (await cluster.get("controller.test", "/%6detrics")).status == 404  # for insiders, which the router would be

    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    for port, tls in ((cluster.http_port, None), (cluster.https_port, trusting)):
        reader, writer = await asyncio.open_connection(
            cluster.address, port, ssl=tls, server_hostname="controller.test" if tls else None
        )
        async with asyncio.timeout(10):
            writer.write(
                b"POST /apps/x/jobs HTTP/1.1\r\nHost: controller.test\r\nContent-Length: 8\r\n"
                b"Connection: upgrade\r\nUpgrade: flynn-attach/0\r\n\r\n"
            )
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(b'{"a": 1}')
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(6) == b"behind"
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"PING"
            writer.close()
    assert seen == [b'{"a": 1}'] * 2


async def test_a_stranger_is_not_spoken_to(cluster: Cluster, backend: Make) -> None:
    """A backend that calls itself a platform service without a certificate for that name gets no request."""
    impostor = await backend("impostor", tls=cluster.identity("evil", "evil").server_context(require_client=False))
    cluster.table.put(Route(type="http", id="c", service="controller", domain="controller.test"))
    await cluster.discoverd.create("controller")
    await cluster.discoverd.register("controller", Instance.at(impostor.instance.addr, "https"))
    await cluster.start()
    await cluster.serves("controller.test", 503)
    assert not impostor.heads


async def test_the_start_fails_without_a_cookie_key(cluster: Cluster) -> None:
    cluster.environment["COOKIE_KEY"] = "short"
    await cluster.start()
    assert cluster.process is not None
    async with asyncio.timeout(10):
        assert await cluster.process.wait() == 1
