"""flynn-logaggregator: the daemon. Its state is memory; a new instance begins with what the leader has, and hosts send
what is newer than its cursors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import supervisor
from flynn.daemon import ConfigError, run
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.logaggregator import client
from flynn.logaggregator.api import logaggregator_api
from flynn.logaggregator.buffer import Logs
from flynn.logaggregator.collector import Collector
from flynn.logaggregator.rfc5424 import FramingViolation
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

SNAPSHOT_LIMIT = timedelta(seconds=20)  # then we start with what we have; hosts replay the rest
RENEWAL_CHECK = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Config:
    api_port: int  # PORT_0
    syslog_port: int  # PORT_1
    listen_ip: str  # LISTEN_IP, all addresses when empty
    service: str  # SERVICE_NAME
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        return cls(
            api_port=_port(environ, "PORT_0", "5000"),
            syslog_port=_port(environ, "PORT_1", "3000"),
            listen_ip=environ.get("LISTEN_IP", ""),
            service=environ.get("SERVICE_NAME") or client.SERVICE,
            environment=environ,
        )


def _port(environ: Mapping[str, str], name: str, default: str) -> int:
    text = environ.get(name) or default
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(f"{name} is not a port number: {text!r}")
    return int(text)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    """Collect and serve logs, and be found under the service's name, while the block is open."""
    identity = Identity.from_environment(config.environment)
    logs = Logs()
    address = config.listen_ip or "0.0.0.0"
    context = identity.server_context()
    async with Discoverd.from_environment(config.environment) as registry, supervisor() as spawn:
        await _take_over(registry, config, identity, logs)
        async with (
            listen(logaggregator_api(logs, SystemClock()), address, config.api_port, tls=identity) as (_, api_port),
            Collector(logs).listening(address, config.syslog_port, context) as syslog_port,
        ):
            spawn("renew the certificate", _renew(identity, context))
            instance = instance_from_environment(config.environment, syslog_port, meta={client.API_PORT: str(api_port)})
            async with registry.registered(config.service, instance):
                yield


async def _take_over(registry: Discoverd, config: Config, identity: Identity, logs: Logs) -> None:
    """Begin with the leader's lines, so that readers see history before hosts have connected."""
    leader = await registry.leader(config.service)
    if leader is None:
        return
    taken = 0
    try:
        async with asyncio.timeout(SNAPSHOT_LIMIT.total_seconds()), client.at(leader, identity) as peer:
            async for message in peer.snapshot():
                logs.add(message)
                taken += 1
    except (ApiError, FramingViolation, TimeoutError) as error:
        log.warning("no whole snapshot of the leader", extra={"leader": leader.addr, "error": error, "lines": taken})
    else:
        log.info("took over the leader's lines", extra={"leader": leader.addr, "lines": taken})


async def _renew(identity: Identity, context: ssl.SSLContext) -> None:
    """Present renewed certificates to new connections."""
    stamp = identity.stamp()
    while True:
        await asyncio.sleep(RENEWAL_CHECK.total_seconds())
        try:
            if identity.stamp() != stamp:
                identity.refresh(context)
                stamp = identity.stamp()
        except (OSError, ssl.SSLError) as error:
            log.warning("could not load the renewed certificate", extra={"error": error})


def main() -> None:
    run(client.SERVICE, lambda: running(Config.from_environment(os.environ)))
