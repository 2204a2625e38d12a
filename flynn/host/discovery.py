"""What the host knows of discoverd: the address jobs are told, and the host's own connection to it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from flynn.discoverd.client import Discoverd
from flynn.discoverd.registry import Registry
from flynn.identity import Identity
from flynn.types.codec import replace
from flynn.types.errors import ServiceUnavailable, ValidationError
from flynn.types.host import DiscoverdConfig

log = logging.getLogger(__name__)


DISCOVERD_PORT = 1111
_ADDRESS = re.compile(r"(?:https?://)?[A-Za-z0-9._-]+:(?P<port>[0-9]{1,5})")


class Discovery:
    """The configuration discoverd has given, and a client made from it."""

    def __init__(self, identity: Identity) -> None:
        self.config: DiscoverdConfig | None = None
        self.ready = asyncio.Event()  # url and dns are known: jobs may be started that need names
        self.connected = asyncio.Event()  # `registry` works
        self._identity = identity
        self._registry: Discoverd | None = None
        self._stack = AsyncExitStack()

    async def configure(self, config: DiscoverdConfig) -> DiscoverdConfig:
        """Take a new configuration; empty fields keep what is known (discoverd posts its url before its dns).

        Raises:
            ValidationError: the addresses make no sense.
        """
        for address in filter(None, config.url.split(",")):
            match = _ADDRESS.fullmatch(address)
            if match is None or not 0 < int(match["port"]) < 65536:
                raise ValidationError("url", f"must be a list of host:port, not {address!r}")
        before = self.config or DiscoverdConfig()
        merged = replace(
            config, job_id=config.job_id or before.job_id, url=config.url or before.url, dns=config.dns or before.dns
        )
        if merged.url and merged.url != before.url:
            await self._connect(merged.url)
        self.config = merged
        if merged.url and merged.dns:
            self.ready.set()
        return merged

    async def begin_with(self, peers: Sequence[str]) -> None:
        """Use the discoverd of other hosts, as long as none has announced itself here.

        That is how the cluster learns of a new host, and comes to start discoverd on it.
        """
        if peers and self._registry is None:
            await self._connect(",".join(f"{ip}:{DISCOVERD_PORT}" for ip in peers))

    async def _connect(self, url: str) -> None:
        addresses = [item.removeprefix("http://").removeprefix("https://") for item in url.split(",")]
        self._registry = await self._stack.enter_async_context(Discoverd.connect(addresses, identity=self._identity))
        self.connected.set()

    @property
    def registry(self) -> Registry:
        """Raises `ServiceUnavailable` before discoverd has announced itself."""
        if self._registry is None:
            raise ServiceUnavailable("discoverd is not known yet")
        return self._registry

    def for_job(self, env: Mapping[str, str]) -> str | None:
        """Return what a job finds in DISCOVERD, unless its creator has decided that."""
        return env.get("DISCOVERD") or (self.config.url if self.config else None)

    async def close(self) -> None:
        await self._stack.aclose()
