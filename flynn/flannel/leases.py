"""This machine's lease in discoverd: got, kept and renewed by compare-and-set on the network state."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network
from typing import Any

from flynn.aio.backoff import Backoff, attempts
from flynn.aio.clock import Clock
from flynn.discoverd.registry import Registry
from flynn.flannel import subnets
from flynn.flannel.document import Document, Lease, Overlay, overlay_of
from flynn.flannel.subnets import OutOfSubnets
from flynn.types.errors import ApiError, NotFound, ObjectExists, PreconditionFailed
from flynn.types.instance import EventKind, ServiceMeta

log = logging.getLogger(__name__)

SERVICE = "flannel"
HOSTS = "flynn-host"

RACE = Backoff(first=timedelta(milliseconds=20), factor=2, limit=timedelta(seconds=2), jitter=0.9)
UNREACHABLE = Backoff(first=timedelta(milliseconds=200), factor=1.5, limit=timedelta(seconds=3))

NO_WISH = IPv4Network("0.0.0.0/32")
"""The subnet of a lease that is yet to be got, by a machine that has not had one."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    registry: Registry
    clock: Clock
    proposed: Mapping[str, Any]  # the configuration, should the cluster have none yet

    async def overlay(self) -> Overlay:
        """The network's configuration, written first if there is none. Waits for discoverd as long as it takes.

        Raises InvalidNetwork when what is there makes no sense.
        """
        async for _ in attempts(UNREACHABLE):
            try:
                await self.registry.create(SERVICE)
                meta = await self.registry.get_meta(SERVICE)
                if meta is None:
                    meta = await self.registry.put_meta(SERVICE, ServiceMeta(data={"config": dict(self.proposed)}))
            except (ObjectExists, ApiError) as error:
                log.info("waiting for discoverd", extra={"error": error})
                continue
            document = _document(meta)
            if document.get("config") != self.proposed:
                # The network cannot change under running containers, so the first configuration stays.
                log.warning(
                    "the cluster's network differs from this machine's configuration, which is ignored",
                    extra={"in_use": document.get("config"), "ignored": dict(self.proposed)},
                )
            return overlay_of(document)
        raise AssertionError("attempts without a limit ended")

    async def ensure_lease(self, overlay: Overlay, me: Lease) -> Lease:
        """Have a lease with the attributes of `me`, renewed now; tries until there is one."""
        async for _ in attempts(RACE):
            try:
                meta = await self.registry.get_meta(SERVICE) or ServiceMeta(data={})
                hosts = await self.registry.instances(HOSTS)
                claim = subnets.claim(
                    {"config": dict(self.proposed), **_document(meta)},
                    overlay,
                    me,
                    now=self.clock.now(),
                    present={host.host for host in hosts},
                    choose=random.choice,
                )
                await self.registry.put_meta(SERVICE, ServiceMeta(data=claim.document, index=meta.index))
            except (PreconditionFailed, ObjectExists):
                continue  # another machine was faster: look again
            except OutOfSubnets as error:
                log.error("no subnet for this machine", extra={"error": error})
            except NotFound:
                await self.registry.create(SERVICE)
            except ApiError as error:
                log.warning("cannot write the lease", extra={"error": error})
            else:
                return claim.lease
        raise AssertionError("attempts without a limit ended")

    async def document(self) -> Document:
        return _document(await self.registry.get_meta(SERVICE) or ServiceMeta(data={}))

    async def documents(self) -> AsyncIterator[Document]:
        """The network state now and after every change, for ever."""
        async with aclosing(self.registry.watch(SERVICE)) as events:
            async for event in events:
                if event.kind is EventKind.SERVICE_META and event.service_meta is not None:
                    yield _document(event.service_meta)


def _document(meta: ServiceMeta) -> Document:
    return meta.data if isinstance(meta.data, Mapping) else {}
