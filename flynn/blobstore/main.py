"""flynn-blobstore: the daemon.

Configuration comes from the environment, see `Config.from_environment`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.blobstore.api import blobstore_api
from flynn.blobstore.mirror import SERVICE as MIRROR_SERVICE
from flynn.blobstore.mirror import Mirror
from flynn.blobstore.volume import VolumeBackend
from flynn.daemon import ConfigError, run
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.types.instance import Instance

SERVICE = "blobstore"
ARGUMENTS = ("", "server")  # the original's subcommand; maintenance of other back ends is not here yet


@dataclass(frozen=True, slots=True)
class Config:
    port: int  # PORT
    listen_ip: str  # LISTEN_IP, all addresses when empty
    data: Path  # BLOBSTORE_DATA, the mounted volume
    signing_key: str  # BLOBSTORE_SIGNING_KEY, shared with gitreceive; empty = no signed URLs
    service: str  # SERVICE_NAME
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        port = environ.get("PORT", "80")
        if not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ConfigError(f"PORT is not a port number: {port!r}")
        backend = environ.get("DEFAULT_BACKEND", "volume")
        if backend != "volume":
            raise ConfigError(f"DEFAULT_BACKEND: there is no back end {backend!r}, only 'volume'")
        return cls(
            port=int(port),
            listen_ip=environ.get("LISTEN_IP", ""),
            data=Path(environ.get("BLOBSTORE_DATA") or "/data"),
            signing_key=environ.get("BLOBSTORE_SIGNING_KEY", ""),
            service=environ.get("SERVICE_NAME") or SERVICE,
            environment=environ,
        )


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    """Serve the volume and be found under the service's name while the block is open."""
    identity = Identity.from_environment(config.environment)
    try:
        backend = VolumeBackend(config.data)
    except OSError as error:
        raise ConfigError(f"BLOBSTORE_DATA: {error}") from error
    own = instance_from_environment(config.environment, config.port, proto="https")

    def connect(instance: Instance) -> HttpClient:
        return HttpClient(f"https://{instance.addr}", tls=identity, server_name=f"{SERVICE}.discoverd")

    async with (
        Discoverd.from_environment(config.environment) as registry,
        supervisor() as spawn,
        TaskSet() as tasks,
    ):
        mirror = Mirror(own, backend, connect, tasks)
        api = blobstore_api(backend, signing_key=config.signing_key, clock=SystemClock(), mirror=mirror)
        address = config.listen_ip or "0.0.0.0"
        async with (
            listen(api, address, config.port, tls=identity, require_client=False),
            registry.registered(MIRROR_SERVICE, own),
        ):
            tasks.start("sweep", backend.sweep())
            spawn("follow members", mirror.follow(registry))
            await mirror.catch_up(registry)
            async with registry.registered(config.service, own):
                yield


def main() -> None:
    run(SERVICE, lambda: running(Config.from_environment(os.environ)))
