"""One push per app at a time, whichever gitreceive it reaches: a lease kept in the blobstore.

The lease is a small blob created only if there is none, rewritten while it is held, and deleted afterwards. A holder
that died stops rewriting; after `LIFETIME` anybody may take the lease over. All steps are conditional on the version
seen, so two takers never both win. Clocks of nodes may differ by some seconds, which only shifts a takeover.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from flynn.aio.clock import Clock
from flynn.blobstore.client import Blobstore
from flynn.types.codec import Wire, decode, encode
from flynn.types.errors import ApiError, NotFound, PreconditionFailed

log = logging.getLogger(__name__)

LIFETIME = timedelta(seconds=30)
RENEWAL = timedelta(seconds=8)  # three may fail before the lease is lost
POLL = timedelta(milliseconds=500)


class Holder(Wire):
    token: str
    expires: datetime


class Leases:
    """Leases on app ids."""

    def __init__(self, blobs: Blobstore, clock: Clock) -> None:
        self._blobs = blobs
        self._clock = clock

    async def try_acquire(self, app_id: str) -> Lease | None:
        """Take the lease if it is free or left behind by a holder that died."""
        name = f"/repos/{app_id}.lease"
        lease = Lease(self._blobs, self._clock, name)
        try:
            await lease.write(only_create=True)
            return lease
        except PreconditionFailed:
            pass
        try:
            async with self._blobs.open(name) as (info, chunks):
                holder = decode(b"".join([chunk async for chunk in chunks]), Holder)
            if holder.expires > self._clock.now():
                return None
            log.warning("taking over a lease that its holder left behind", extra={"lease": name})
            await lease.write(if_match=info.etag)
        except (NotFound, PreconditionFailed):
            return None  # someone was faster; the next try will see
        return lease

    async def acquire(self, app_id: str) -> Lease:
        """Wait for the lease without limit."""
        while (lease := await self.try_acquire(app_id)) is None:
            await self._clock.sleep(POLL)
        return lease


class Lease:
    """A lease that is held. Keep it with `kept`, which gives it back at the end."""

    def __init__(self, blobs: Blobstore, clock: Clock, name: str) -> None:
        self._blobs = blobs
        self._clock = clock
        self._name = name
        self._token = uuid.uuid4().hex
        self._etag = ""

    async def write(self, *, only_create: bool = False, if_match: str | None = None) -> None:
        """Write the lease with a new time of expiry. Raises PreconditionFailed."""
        holder = Holder(token=self._token, expires=self._clock.now() + LIFETIME)
        info = await self._blobs.put(self._name, encode(holder), only_create=only_create, if_match=if_match)
        self._etag = info.etag

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renew the lease while the block runs, then give it back."""
        renewal = asyncio.ensure_future(self._renew())
        try:
            yield
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)
            try:
                await self._blobs.delete(self._name, if_match=self._etag)
            except ApiError as error:
                log.warning("could not give a lease back", extra={"lease": self._name, "error": error})

    async def _renew(self) -> None:
        while True:
            await self._clock.sleep(RENEWAL)
            try:
                await self.write(if_match=self._etag)
            except PreconditionFailed:
                log.error("a lease was taken over while it was held", extra={"lease": self._name})
                return
            except ApiError as error:
                log.warning("could not renew a lease", extra={"lease": self._name, "error": error})
