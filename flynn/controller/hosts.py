"""The hosts of the cluster, as far as one-off jobs and kills need them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flynn.discoverd.registry import Registry
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ServiceUnavailable
from flynn.types.instance import Instance

SERVICE = "flynn-host"
CALL_TIMEOUT = 60.0  # seconds; stopping a job takes up to 30


class Hosts:
    """Finds hosts in discoverd and opens their APIs."""

    def __init__(self, registry: Registry, identity: Identity | None) -> None:
        self._registry = registry
        self._identity = identity

    async def count(self) -> int:
        """Return how many hosts there are."""
        return len(await self._registry.instances(SERVICE))

    async def pick(self) -> str:
        """Return the id of a host, any of them. Raises `ServiceUnavailable` when there is none."""
        hosts = [host for instance in await self._registry.instances(SERVICE) if (host := _host_id(instance))]
        if not hosts:
            raise ServiceUnavailable("there is no host to run the job on", retry=False)
        return random.choice(hosts)

    @asynccontextmanager
    async def open(self, host_id: str) -> AsyncIterator[HostClient]:
        """Open the API of one host. Raises `ServiceUnavailable` if it is not there."""
        for instance in await self._registry.instances(SERVICE):
            if _host_id(instance) == host_id:
                scheme = "https" if self._identity is not None else "http"
                async with HttpClient(f"{scheme}://{instance.addr}", tls=self._identity, timeout=CALL_TIMEOUT) as http:
                    yield HostClient(http)
                return
        raise ServiceUnavailable(f"host {host_id} is not there", retry=False)


def _host_id(instance: Instance) -> str:
    return instance.meta.get("id", "")
