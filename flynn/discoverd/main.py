"""The discoverd process: service directory, leaders, DNS."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from flynn import daemon
from flynn.aio.backoff import Backoff, retrying
from flynn.aio.clock import Clock, SystemClock
from flynn.aio.supervisor import supervisor
from flynn.discoverd import config as configuration
from flynn.discoverd import directory, nameserver, standing
from flynn.discoverd.api import DiscoverdApi
from flynn.discoverd.client import Discoverd
from flynn.discoverd.config import Config
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.hostlink import HostLink
from flynn.discoverd.instances import IDENTIFYING
from flynn.discoverd.membership import raft_address
from flynn.discoverd.nameserver import Address, NameServer
from flynn.discoverd.raft.node import NotReplicated, RaftConfig
from flynn.discoverd.recursion import Upstream
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.http.server import listen, shutting_down
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

HOST_TIMEOUT = 5.0
CATCH_UP_LIMIT = 10.0  # seconds to wait for a leader before serving what is on disk
CATCH_UP_POLL = Backoff(first=timedelta(milliseconds=20), factor=1)


def main() -> None:
    daemon.run("discoverd", lambda: running(configuration.parse(sys.argv[1:], os.environ), SystemClock()))


@asynccontextmanager
async def running(config: Config, clock: Clock) -> AsyncIterator[LiveDirectory]:
    """All of discoverd. Entered when the API answers; a leader, the name server and the host follow as they come."""
    identity = Identity.load(config.identity)
    raft = RaftConfig(
        address=raft_address(config.address),
        peers=[raft_address(peer) for peer in config.peers],
        directory=config.data_dir,
        password=configuration.raft_password(config),
    )
    async with AsyncExitStack() as stack:
        live = await stack.enter_async_context(directory.running(raft, clock))
        # Not a word before the log is replayed: a watcher would take the gaps for departures.
        await _caught_up(live)
        stopping = asyncio.Event()
        api = DiscoverdApi(live, config.address, identity, stopping.set).build()
        await stack.enter_async_context(listen(api, config.host, config.port, tls=identity))
        if config.admin_key_file.is_file() and config.host != LOOPBACK:
            key = config.admin_key_file.read_text().strip()
            await stack.enter_async_context(listen(api, LOOPBACK, config.port, key=key))
        else:
            log.info("no plain API on loopback", extra={"key": config.admin_key_file})
        registry = await stack.enter_async_context(Discoverd.connect(config.address, identity=identity))
        names = _Names(live, config.recursors, clock)
        dns = ""
        if config.dns_address is not None:
            ip, port = await stack.enter_async_context(names.serve(config.dns_address, ()))
            dns = f"{ip}:{port}"
        http = await stack.enter_async_context(
            HttpClient(config.host_url or "https://unconfigured", tls=identity, timeout=HOST_TIMEOUT)
        )
        # Our own address first: who lives on this node asks here, and elsewhere only when nobody answers.
        addresses = dict.fromkeys((config.address, *config.peers))
        link = HostLink(HostClient(http), config.job_id, ",".join(addresses))
        spawn = await stack.enter_async_context(supervisor())
        spawn("stay registered", _stay_registered(registry, Instance.at(config.address, "https", _identifying())))
        spawn("keep our standing", standing.keep(live, identity))
        spawn("shut down on request", _shut_down(stopping))
        if config.host_url and config.follow_bridge and not dns:
            spawn("follow the host's bridge", link.follow_bridge(names.serve))
        elif config.host_url:
            spawn("keep the host informed", link.keep_informed(dns))
        try:
            yield live
        finally:
            live.end_watches(shutting_down("discoverd"))


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Names:
    """Makes the name server, when it is known where it belongs."""

    live: LiveDirectory
    recursors: Sequence[str]  # configured ones; else the host's
    clock: Clock

    def serve(self, address: Address, resolvers: Sequence[str]) -> AbstractAsyncContextManager[Address]:
        upstreams = []
        for resolver in self.recursors or resolvers:
            try:
                upstreams.append(Upstream.parse(resolver))
            except ValueError as error:
                log.warning("resolver left out", extra={"error": error})
        server = NameServer(lambda: self.live.state, upstreams, self.clock)
        return nameserver.serving(address, server)


def _identifying() -> dict[str, str]:
    return {key: os.environ[key] for key in IDENTIFYING if os.environ.get(key)}


async def _caught_up(live: LiveDirectory) -> None:
    """Wait until this member knows what was committed before it started; without a majority, only for a while.

    Then it goes on with what it has: names that resolve to old addresses are better than none.
    """
    try:
        async with asyncio.timeout(CATCH_UP_LIMIT):
            await retrying(live.raft.barrier, on=NotReplicated, policy=CATCH_UP_POLL)
            while live.raft.is_leader and not live.leading:
                await asyncio.sleep(0.01)
    except TimeoutError:
        log.warning("no leader yet, serving what was known before")


async def _stay_registered(registry: Discoverd, instance: Instance) -> None:
    while True:
        try:
            async with registry.registered("discoverd", instance):
                await asyncio.Event().wait()
        except ApiError as error:
            log.warning("could not register", extra={"error": error})


async def _shut_down(stopping: asyncio.Event) -> None:
    """Leave as if asked by a signal, once the answer to whoever asked is out."""
    await stopping.wait()
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), 15)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
