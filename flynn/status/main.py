"""flynn-status: asks every part of the cluster how it is, and serves the answer."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from flynn.daemon import ConfigError, run
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.discoverd.registry import Registry
from flynn.http.client import HttpClient, KeyAuth
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.status.api import status_api
from flynn.status.checks import CHECKS, UNKNOWN, Ask, Check, summary
from flynn.types.codec import decode
from flynn.types.errors import ApiError
from flynn.types.instance import Instance
from flynn.types.status import Status, StatusDocument
from flynn.version import VERSION

SERVICE = "status-web"
CHECK_SECONDS = 2.0
STATUS_PATH = "/.well-known/status"


@dataclass(frozen=True, slots=True)
class Config:
    port: int  # PORT
    listen_ip: str  # LISTEN_IP, all addresses when empty
    key: str  # AUTH_KEY: for those who look from outside; empty: everybody may
    controller_key: str  # CONTROLLER_KEY
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        port = environ.get("PORT", "80")
        if not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"PORT is not a port number: {port!r}")
        return cls(
            port=int(port),
            listen_ip=environ.get("LISTEN_IP", ""),
            key=environ.get("AUTH_KEY", ""),
            controller_key=environ.get("CONTROLLER_KEY", "").partition(",")[0],
            environment=environ,
        )


class Inquiry:
    """Asks all services at once; one that does not answer in time is unhealthy."""

    def __init__(self, registry: Registry, identity: Identity, controller_key: str, rng: random.Random) -> None:
        self._registry = registry
        self._identity = identity
        self._controller_key = controller_key
        self._rng = rng

    async def __call__(self) -> Status:
        async with asyncio.TaskGroup() as group:
            tasks = {check: group.create_task(self._ask(check)) for check in CHECKS}
        answers = {check.name: task.result() for check, task in tasks.items()}
        return summary({name: status for name, status in answers.items() if status is not None}, VERSION)

    async def _ask(self, check: Check) -> Status | None:
        """None for an optional service that is not there."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                instance = await self._choose(check)
                if instance is None:
                    return None if check.optional else UNKNOWN
                return await self._status_of(check, instance)
        except (ApiError, OSError, TimeoutError):
            return UNKNOWN

    async def _choose(self, check: Check) -> Instance | None:
        if check.ask is Ask.LEADER:
            return await self._registry.leader(check.service)
        instances = await self._registry.instances(check.service)
        return self._rng.choice(instances) if instances else None

    async def _status_of(self, check: Check, instance: Instance) -> Status:
        auth = KeyAuth(self._controller_key) if check.with_key else None
        url = f"https://{check.address(instance)}"
        async with HttpClient(url, tls=self._identity, auth=auth, timeout=CHECK_SECONDS) as http:
            try:
                return (await http.get(STATUS_PATH, answer=StatusDocument)).data
            except ApiError as error:
                # An unhealthy service says so with its own document and code 500.
                return decode(error.message, StatusDocument).data


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    identity = Identity.from_environment(config.environment)
    async with Discoverd.from_environment(config.environment) as registry:
        inquiry = Inquiry(registry, identity, config.controller_key, random.Random())
        api = status_api(inquiry, config.key)
        async with (
            listen(api, config.listen_ip or "0.0.0.0", config.port, tls=identity) as (_, port),
            registry.registered(SERVICE, instance_from_environment(config.environment, port, "https")),
        ):
            yield


def main() -> None:
    run("status", lambda: running(Config.from_environment(os.environ)))
