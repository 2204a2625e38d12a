"""One push per app at a time, whichever gitreceive it reaches: a lease kept in the blobstore.

The lease is a small blob created only if there is none, rewritten while it is held, and deleted afterwards. A holder
that died stops rewriting; after `LIFETIME` anybody may take the lease over, and after `SILENCE` if the directory does
not list the holder either. Neither alone says that much: one that is being replaced has left the directory and
finishes its pushes, and one that does not rewrite for a moment may just not reach the blobstore. All steps are
conditional on the version seen, so two takers never both win. Clocks of nodes may differ by some seconds, which only
shifts a takeover after `LIFETIME`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from flynn.aio.clock import Clock
from flynn.blobstore.client import Blobstore
from flynn.types.codec import Wire, decode, encode
from flynn.types.errors import ApiError, NotFound, PreconditionFailed

log = logging.getLogger(__name__)

LIFETIME = timedelta(seconds=30)
RENEWAL = timedelta(seconds=2)
SILENCE = timedelta(seconds=6)  # without a renewal
POLL = timedelta(milliseconds=500)


class Holder(Wire):
    token: str
    expires: datetime
    job: str = ""  # that holds it; empty if it does not know


IsListed = Callable[[str], Awaitable[bool]]
"""Whether the directory lists a job as a gitreceive. Raises ApiError when it cannot be asked."""


class Leases:
    """Leases on app ids, held by the job `job`."""

    def __init__(self, blobs: Blobstore, clock: Clock, job: str, is_listed: IsListed) -> None:
        self._blobs = blobs
        self._clock = clock
        self._job = job
        self._is_listed = is_listed

    async def try_acquire(self, app_id: str) -> Lease | None:
        """Take the lease if it is free or left behind by a holder that died."""
        name = f"/repos/{app_id}.lease"
        lease = Lease(self._blobs, self._clock, name, self._job)
        try:
            await lease.write(only_create=True)
            return lease
        except PreconditionFailed:
            pass
        try:
            async with self._blobs.open(name) as (info, chunks):
                holder = decode(b"".join([chunk async for chunk in chunks]), Holder)
            if holder.expires > self._clock.now() and not await self._is_dead(holder):
                return None
            await lease.write(if_match=info.etag)  # refused if the holder has renewed it since it was read
            lease.taken_over = True
            log.warning("took over a lease that its holder left behind", extra={"lease": name, "holder": holder.job})
        except (NotFound, PreconditionFailed):
            return None  # someone was faster; the next try will see
        return lease

    async def _is_dead(self, holder: Holder) -> bool:
        """Whether the holder is not in the directory; if so, answers only after it has had time to renew its lease."""
        if not holder.job:
            return False
        try:
            if await self._is_listed(holder.job):
                return False
            await self._clock.sleep(SILENCE)
            return not await self._is_listed(holder.job)
        except ApiError as error:
            log.info("the directory cannot be asked for the holder of a lease", extra={"error": error})
            return False

    async def acquire(self, app_id: str) -> Lease:
        """Wait for the lease without limit."""
        while (lease := await self.try_acquire(app_id)) is None:
            await self._clock.sleep(POLL)
        return lease


class Lease:
    """A lease that is held. Keep it with `kept`, which gives it back at the end."""

    def __init__(self, blobs: Blobstore, clock: Clock, name: str, job: str) -> None:
        self.token = uuid.uuid4().hex
        self.taken_over = False  # from a holder that died, and may have left more than this behind
        self._blobs = blobs
        self._clock = clock
        self._name = name
        self._job = job
        self._etag = ""

    async def write(self, *, only_create: bool = False, if_match: str | None = None) -> None:
        """Write the lease with a new time of expiry. Raises PreconditionFailed."""
        holder = Holder(token=self.token, expires=self._clock.now() + LIFETIME, job=self._job)
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
