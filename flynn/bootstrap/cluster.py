"""The cluster as bootstrap sees it: its hosts, its directory, and the way to a service by name.

Bootstrap runs on a node, as root, before and while names resolve; so a `.discoverd` address is looked up in the
directory, and the server proves to be that service by its certificate.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from flynn.aio.backoff import Backoff, attempts
from flynn.controller.client import Controller
from flynn.discoverd.client import Discoverd
from flynn.host.client import HostClient
from flynn.http.client import HttpClient, KeyAuth, Retry
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.host import HostStatus
from flynn.types.instance import Instance

EVERY = Backoff(first=timedelta(milliseconds=200), factor=1.3, limit=timedelta(seconds=1), jitter=0)
CALL_SECONDS = 30.0


class BootstrapError(Exception):
    """A step failed; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Host:
    id: str
    url: str
    client: HostClient

    @property
    def ip(self) -> str:
        return urlsplit(self.url).hostname or ""


class Cluster:
    """Clients are opened as needed and closed together."""

    def __init__(self, identity: Identity, local_key: str, *, local_url: str = "http://127.0.0.1") -> None:
        self._identity = identity
        self._local_key = local_key
        self._local_url = local_url
        self._opened: list[HttpClient] = []
        self._controller: Controller | None = None
        self._directory: Discoverd | None = None
        self.hosts: list[Host] = []
        self.controller_key = ""

    async def close(self) -> None:
        for client in self._opened:
            await client.close()
        if self._directory is not None:
            await self._directory.__aexit__(None, None, None)

    async def find_hosts(self, peer_ips: list[str], min_hosts: int, timeout: timedelta) -> None:
        """Wait until `min_hosts` hosts answer; those that answered then are the cluster."""
        candidates = {ip: self._http(f"https://{ip}:1113", name="flynn-host.discoverd") for ip in peer_ips} or {
            "127.0.0.1": self._http(f"{self._local_url}:1113", key=self._local_key)
        }
        failures: dict[str, str] = {}
        async for _ in attempts(EVERY, timeout):
            found: dict[str, tuple[HostStatus, HttpClient]] = {}
            failures = {}
            for ip, http in candidates.items():
                try:
                    found[ip] = (await http.call("GET", "/host/status", answer=HostStatus, timeout=5.0), http)  # type: ignore[assignment]
                except ApiError as error:
                    failures[ip] = str(error)
            if len(found) >= min_hosts:
                self.hosts = [Host(status.id, status.url, HostClient(http)) for status, http in found.values()]
                return
        raise BootstrapError(
            f"only {len(candidates) - len(failures)} of {min_hosts} hosts are online; unreachable: "
            + ", ".join(f"{ip} ({reason})" for ip, reason in failures.items())
        )

    @property
    def host_ips(self) -> list[str]:
        return sorted(host.ip for host in self.hosts)

    @property
    def singleton(self) -> bool:
        return len(self.hosts) == 1

    async def directory(self) -> Discoverd:
        if self._directory is None:
            self._directory = Discoverd.connect(f"{self._local_url}:1111", key=self._local_key)
            await self._directory.__aenter__()
        return self._directory

    async def instance(self, service: str, within: timedelta) -> Instance:
        """The first instance of `service`, waiting for it to appear."""
        directory = await self.directory()
        async for _ in attempts(EVERY, within):
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    instances = await directory.instances(service)
            except (ApiError, TimeoutError):
                continue
            if instances:
                return instances[0]
        raise BootstrapError(f"no instance of {service!r} appeared within {within.total_seconds():.0f} seconds")

    async def controller(self) -> Controller:
        """The controller's API, looked up once."""
        if self._controller is None:
            instance = await self.instance("controller", timedelta(seconds=60))
            http = HttpClient(
                "https://controller.discoverd:80",
                auth=KeyAuth(self.controller_key),
                tls=self._identity,
                connect_to=instance.addr,
                retry=Retry(within=timedelta(seconds=30)),
            )
            self._opened.append(http)
            self._controller = Controller(http)
        return self._controller

    def forget_controller(self) -> None:
        """Look the controller up again at the next call: the instance that was talked to may have been replaced."""
        self._controller = None

    async def client_of(self, url: str, within: timedelta, *, host_header: str = "") -> tuple[HttpClient, str]:
        """A client for the server of `url`, and the path to ask for. `.discoverd` names are looked up first."""
        split = urlsplit(url)
        name = split.hostname or ""
        connect_to = None
        if name.endswith(".discoverd"):
            connect_to = (await self.instance(name.split(".")[0], within)).addr
        base = f"{split.scheme}://{split.netloc}"
        http = HttpClient(
            base,
            tls=self._identity if split.scheme == "https" else None,
            connect_to=connect_to,
            timeout=CALL_SECONDS,
            host_header=host_header,
        )
        return http, (split.path or "/") + (f"?{split.query}" if split.query else "")

    async def reachable(self, service: str, within: timedelta) -> bool:
        """Whether a TCP connection to an instance of `service` can be made now."""
        instance = await self.instance(service, within)
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(instance.host, instance.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    def _http(self, url: str, *, key: str | None = None, name: str | None = None) -> HttpClient:
        http = HttpClient(
            url,
            auth=KeyAuth(key) if key else None,
            tls=None if key else self._identity,
            server_name=name,
            timeout=CALL_SECONDS,
            retry=Retry(within=timedelta(seconds=15)),
        )
        self._opened.append(http)
        return http
