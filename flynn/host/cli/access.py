"""How the tool reaches hosts: the one it runs on through loopback and the admin key, the others by certificate."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from flynn.host.client import HostClient
from flynn.host.config import CONFIG_DIR, HTTP_PORT, STATE_DIR
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.errors import ApiError, NotFound
from flynn.types.host import ActiveJob
from flynn.types.instance import Instance

P = ParamSpec("P")
T = TypeVar("T")

SERVER_NAME = "flynn-host.discoverd"
DISCOVERD_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Found:
    """A host of the cluster."""

    id: str
    address: str
    client: HostClient


def config_dir() -> Path:
    return Path(os.environ.get("FLYNN_CONFIG_DIR") or CONFIG_DIR)


def state_dir() -> Path:
    return Path(os.environ.get("FLYNN_STATE_DIR") or STATE_DIR)


def admin_key() -> str:
    try:
        return (config_dir() / "host.key").read_text().strip()
    except OSError as error:
        raise click.ClickException(
            f"cannot read the admin key: {error}; run this as root on a host of the cluster, "
            "which `flynn-host init` or `flynn-host join` makes of a machine"
        ) from error


@asynccontextmanager
async def local_host() -> AsyncIterator[HostClient]:
    """The host of this machine."""
    port = os.environ.get("FLYNN_HOST_PORT", str(HTTP_PORT))
    async with HttpClient(f"http://127.0.0.1:{port}", auth=KeyAuth(admin_key())) as http:
        yield HostClient(http)


@asynccontextmanager
async def discoverd_at(address: str) -> AsyncIterator[HttpClient]:
    """The discoverd of a node, by the certificate of this one."""
    identity = Identity.load(state_dir() / "identity")
    async with HttpClient(f"https://{address}", tls=identity, server_name="discoverd.discoverd") as http:
        yield http


async def directory_peers() -> tuple[list[str], str]:
    """The members (`ip:1111`) as this machine's discoverd knows them, and the one that leads, if any."""
    async with HttpClient("http://127.0.0.1:1111", auth=KeyAuth(admin_key()), timeout=DISCOVERD_SECONDS) as http:
        peers = await http.get("/raft/peers", answer=list[str])
        try:
            leader = (await http.get("/raft/leader", answer=dict[str, str])).get("host", "")
        except ApiError:
            leader = ""
    return peers, leader


@asynccontextmanager
async def all_hosts() -> AsyncIterator[list[Found]]:
    """Every host discoverd knows, and this machine's in any case."""
    async with local_host() as own:
        status = await own.status()
        found = [Found(status.id, status.url.removeprefix("https://"), own)]
        others: list[HttpClient] = []
        try:
            for instance in await _registered():
                if instance.meta.get("id") not in (None, status.id):
                    identity = Identity.load(state_dir() / "identity")
                    http = HttpClient(f"https://{instance.addr}", tls=identity, server_name=SERVER_NAME)
                    others.append(http)
                    found.append(Found(instance.meta["id"], instance.addr, HostClient(http)))
            yield found
        finally:
            for http in others:
                await http.close()


def directory_url() -> str:
    """Where discoverd is asked: the first address in DISCOVERD, else this machine's own."""
    address = (os.environ.get("DISCOVERD") or "http://127.0.0.1:1111").partition(",")[0]
    return address if "://" in address else f"http://{address}"


@asynccontextmanager
async def host_at(ip: str) -> AsyncIterator[Found]:
    """The host at an address, by the certificate of this one."""
    identity = Identity.load(state_dir() / "identity")
    address = f"{ip}:{HTTP_PORT}"
    async with HttpClient(f"https://{address}", tls=identity, server_name=SERVER_NAME) as http:
        client = HostClient(http)
        yield Found((await client.status()).id, address, client)


async def _registered() -> list[Instance]:
    """The hosts discoverd knows; none while it does not answer, for the tool is there to repair that too."""
    try:
        async with HttpClient(directory_url(), auth=KeyAuth(admin_key()), timeout=DISCOVERD_SECONDS) as http:
            return await http.get("/services/flynn-host/instances", answer=list[Instance])
    except ApiError:
        return []


async def host_named(hosts: list[Found], host_id: str) -> HostClient:
    for host in hosts:
        if host.id == host_id:
            return host.client
    raise click.ClickException(f"no host with id {host_id}; `flynn-host list` shows them")


@asynccontextmanager
async def host_of(job_id: str) -> AsyncIterator[HostClient]:
    """The host a job runs on, by the first part of its id."""
    host_id, dash, rest = job_id.partition("-")
    if not dash or not host_id or not rest:
        raise click.ClickException(f"could not parse {job_id}: invalid ID")
    async with all_hosts() as hosts:
        yield await host_named(hosts, host_id)


async def find_job(client: HostClient, job_id: str) -> ActiveJob:
    try:
        return await client.job(job_id)
    except NotFound as error:
        raise click.ClickException("no such job; `flynn-host ps -a` lists them") from error


def runs(command: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make a click command of a coroutine function."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return asyncio.run(command(*args, **kwargs))

    return wrapper
