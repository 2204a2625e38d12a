"""The discoverd process: service directory, leaders, DNS."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

from flynn import daemon
from flynn.aio.backoff import Backoff, retrying
from flynn.aio.clock import Clock, SystemClock
from flynn.aio.supervisor import supervisor
from flynn.discoverd import config as configuration
from flynn.discoverd import directory, nameserver, standing
from flynn.discoverd.api import DiscoverdApi
from flynn.discoverd.client import Discoverd, KeptRegistration
from flynn.discoverd.config import Config
from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.hostlink import HostLink
from flynn.discoverd.instances import IDENTIFYING, join_host_port
from flynn.discoverd.membership import raft_address
from flynn.discoverd.nameserver import Address, NameServer
from flynn.discoverd.raft.node import NotReplicated, RaftConfig
from flynn.discoverd.recursion import Upstream
from flynn.discoverd.store import Directory
from flynn.discoverd.succession import SERVICE, DataDirectoryLock, Succession
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.http.server import listen, shutting_down
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.instance import Instance, LeaderType

log = logging.getLogger(__name__)

HOST_TIMEOUT = 5.0
CATCH_UP_LIMIT = 10.0  # seconds to wait for a leader before serving what is on disk
LEAVE_SECONDS = 3.0
REGISTER_AGAIN_SECONDS = 1.0
CATCH_UP_POLL = Backoff(first=timedelta(milliseconds=20), factor=1)


SWITCH_INTERVAL = 0.0005  # seconds; the Raft thread wants its turn while requests are being answered


def main() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL)
    daemon.run("discoverd", lambda: running(configuration.parse(sys.argv[1:], os.environ), SystemClock()))


@asynccontextmanager
async def running(config: Config, clock: Clock) -> AsyncIterator[LiveDirectory]:
    """All of discoverd. Entered when the API answers; a leader, the name server and the host follow as they come.

    When a successor has asked for it, leaving this replaces the process by a new one of the same release that stands
    by. Until the successor answers, names are answered here: their part is entered first, and left last.
    """
    identity = Identity.load(config.identity)
    succession = Succession(config, identity, config.release)
    make_way = asyncio.Event()
    async with AsyncExitStack() as stack:
        lock = stack.enter_context(DataDirectoryLock(config.data_dir))
        await succession.begin(lock)
        http = await stack.enter_async_context(
            HttpClient(config.host_url or "https://unconfigured", tls=identity, timeout=HOST_TIMEOUT)
        )
        # Our own address first: who lives on this node asks here, and elsewhere only when nobody answers.
        link = HostLink(HostClient(http), config.job_id, ",".join(dict.fromkeys((config.address, *config.peers))))
        names = _Names(config.recursors, clock)
        spawn = await stack.enter_async_context(supervisor())
        async with _member(config, clock, identity, names, make_way) as live:
            names.state = lambda: live.state
            if config.dns_address is not None:
                await stack.enter_async_context(names.serve(config.dns_address, ()))
            if config.host_url and config.follow_bridge and not names.address:
                spawn("follow the host's bridge", link.follow_bridge(names.serve))
            elif config.host_url:
                spawn("keep the host informed", link.keep_informed(names.address))
            spawn("tell the deployment", _once(succession.done()))
            yield live
            if make_way.is_set():
                link.silent = True
        if make_way.is_set() and not await succession.followed(lock, config.job_id, names.address):
            log.warning("nobody came to take over")
    if make_way.is_set():
        log.info("standing by for another process")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@asynccontextmanager
async def _member(
    config: Config, clock: Clock, identity: Identity, names: _Names, make_way: asyncio.Event
) -> AsyncIterator[LiveDirectory]:
    """What only one process of a node can be: part of the cluster, with its doors open, and known in the directory."""
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
        api = DiscoverdApi(live, config.address, identity, make_way.set, lambda: _about(config, names)).build()
        await stack.enter_async_context(listen(api, config.host, config.port, tls=identity))
        if config.admin_key_file.is_file() and config.host != LOOPBACK:
            key = config.admin_key_file.read_text().strip()
            await stack.enter_async_context(listen(api, LOOPBACK, config.port, key=key))
        else:
            log.info("no plain API on loopback", extra={"key": config.admin_key_file})
        registry = await stack.enter_async_context(Discoverd.connect(config.address, identity=identity))
        own = Instance.at(config.address, "https", _identifying())

        async def leave() -> None:
            await _leave(live, registry, own, in_favour_of_a_successor=make_way.is_set())

        stack.push_async_callback(leave)
        spawn = await stack.enter_async_context(supervisor())
        spawn("stay registered", _stay_registered(KeptRegistration(registry, SERVICE, own, LeaderType.OLDEST)))
        spawn("keep our standing", standing.keep(live, identity))
        spawn("make way on request", _end_when(make_way))
        yield live


async def _leave(live: LiveDirectory, registry: Discoverd, own: Instance, *, in_favour_of_a_successor: bool) -> None:
    """Take leave of the cluster while it can still hear us: of the watchers, of the directory, of the lead."""
    if not in_favour_of_a_successor:
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await registry.deregister(SERVICE, own.id)
        except (ApiError, TimeoutError) as error:
            log.warning("could not deregister", extra={"error": repr(error)})
    live.end_watches(shutting_down("discoverd"))
    if live.raft.is_leader and len(live.raft.members) > 1:
        try:
            await live.raft.hand_over(LEAVE_SECONDS)
        except NotReplicated as error:
            log.warning("leaving as the leader", extra={"error": error})


def _about(config: Config, names: _Names) -> dict[str, str]:
    return {"release": config.release, "job": config.job_id, "dns": names.address}


LOOPBACK = "127.0.0.1"


class _Names:
    """Makes the name server, when it is known where it belongs."""

    def __init__(self, recursors: Sequence[str], clock: Clock) -> None:
        self.state: Callable[[], Directory] = Directory
        self.address = ""  # where names are answered at the moment
        self._recursors = recursors  # configured ones; else the host's
        self._clock = clock

    @asynccontextmanager
    async def serve(self, address: Address, resolvers: Sequence[str]) -> AsyncIterator[Address]:
        upstreams = []
        for resolver in self._recursors or resolvers:
            try:
                upstreams.append(Upstream.parse(resolver))
            except ValueError as error:
                log.warning("resolver left out", extra={"error": error})
        server = NameServer(lambda: self.state(), upstreams, self._clock)
        async with nameserver.serving(address, server) as bound:
            self.address = join_host_port(*bound)
            try:
                yield bound
            finally:
                self.address = ""


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


async def _stay_registered(registration: KeptRegistration) -> None:
    while True:
        try:
            await registration.announce()
        except ApiError as error:
            log.warning("could not register", extra={"error": error})
            await asyncio.sleep(REGISTER_AGAIN_SECONDS)
        else:
            await registration.heartbeat()


async def _end_when(asked: asyncio.Event) -> None:
    """Leave as if asked by a signal, once the answer to whoever asked is out."""
    await asked.wait()
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.Event().wait()


async def _once(task: Awaitable[None]) -> None:
    await task
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
