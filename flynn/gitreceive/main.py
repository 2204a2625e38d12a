"""flynn-gitreceive: the daemon."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.aio.clock import SystemClock
from flynn.blobstore import client as blobstore
from flynn.controller import client as controller
from flynn.daemon import ConfigError, run
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.gitreceive.api import Surroundings, gitreceive_api
from flynn.gitreceive.lease import Leases
from flynn.gitreceive.repository import Repositories
from flynn.gitreceive.strays import Strays
from flynn.http.server import listen
from flynn.identity import Identity

SERVICE = "gitreceive"
JOB_ID = "FLYNN_JOB_ID"


@dataclass(frozen=True, slots=True)
class Config:
    port: int  # PORT
    listen_ip: str  # LISTEN_IP, all addresses when empty
    controller_key: str  # CONTROLLER_KEY
    controller_url: str  # CONTROLLER_URL
    blobstore_url: str  # BLOBSTORE_URL
    directory: Path  # TMPDIR: repositories are unpacked below it
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        port = environ.get("PORT", "")
        if not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"PORT is not a port number: {port!r}")
        for name in ("CONTROLLER_KEY", "BLOBSTORE_SIGNING_KEY"):
            if not environ.get(name):
                raise ConfigError(f"{name} must be set")
        return cls(
            port=int(port),
            listen_ip=environ.get("LISTEN_IP", ""),
            controller_key=environ["CONTROLLER_KEY"],
            controller_url=environ.get("CONTROLLER_URL") or controller.INSIDE_URL,
            blobstore_url=environ.get("BLOBSTORE_URL") or blobstore.LEADER_URL,
            directory=Path(environ.get("TMPDIR") or tempfile.gettempdir()),
            environment=environ,
        )


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    """Serve git while the block is open."""
    identity = Identity.from_environment(config.environment)
    home = Path(config.environment.get("HOME") or "/")
    home = Path("/root") if home == Path("/") else home
    install_ssh_files(home, config.environment)
    remove_leftovers(config.directory)
    async with (
        blobstore.inside(identity, url=config.blobstore_url) as blobs,
        controller.inside(config.controller_key, identity, url=config.controller_url) as apps,
        Discoverd.from_environment(config.environment) as registry,
    ):

        async def is_listed(job: str) -> bool:
            return any(instance.meta.get(JOB_ID) == job for instance in await registry.instances(SERVICE))

        surroundings = Surroundings(
            key=config.controller_key,
            apps=apps,
            repositories=Repositories(blobs, config.directory),
            leases=Leases(blobs, SystemClock(), config.environment.get(JOB_ID, ""), is_listed),
            strays=Strays(registry, identity),
            environment={**config.environment, "HOME": str(home)},
        )
        async with (
            listen(gitreceive_api(surroundings), config.listen_ip or "0.0.0.0", config.port, tls=identity) as (_, port),
            registry.registered(SERVICE, instance_from_environment(config.environment, port, proto="https")),
        ):
            yield


def install_ssh_files(home: Path, environ: Mapping[str, str]) -> None:
    """Submodules are fetched with the key the operator has set."""
    for name, variable in (("id_rsa", "SSH_CLIENT_KEY"), ("known_hosts", "SSH_CLIENT_HOSTS")):
        if content := environ.get(variable):
            (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
            path = home / ".ssh" / name
            path.touch(mode=0o600)
            path.write_text(content.rstrip("\n") + "\n")


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed predecessor left in the same directory."""
    for path in directory.glob("repo-*"):
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    run(SERVICE, lambda: running(Config.from_environment(os.environ)))
