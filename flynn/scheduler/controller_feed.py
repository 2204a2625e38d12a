"""What the controller tells: formations, volumes, and its books of jobs, as streams and as listings."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from flynn.aio.backoff import Backoff
from flynn.aio.clock import Clock
from flynn.scheduler import wire
from flynn.scheduler.events import (
    FormationReceived,
    FormationsListed,
    RecordsListed,
    RecordsUnavailable,
    VolumeRecorded,
    VolumesRecorded,
)
from flynn.scheduler.model import JobID
from flynn.scheduler.neighbours import ControllerApi, Tell
from flynn.types.codec import ZERO_TIME
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

RECONNECT = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))
LISTING_LIMIT = timedelta(seconds=10)


class ControllerFeed:
    def __init__(self, controller: ControllerApi, clock: Clock, tell: Tell) -> None:
        self.current = asyncio.Event()  # all formations are known
        self._controller = controller
        self._clock = clock
        self._tell = tell

    async def list_records(self, untold: frozenset[JobID]) -> bool:
        """Tell which jobs the controller holds for active; `untold` are those of which it has yet to be told something.

        Returns whether it has answered.
        """
        asked_at = self._clock.now()
        try:
            async with asyncio.timeout(LISTING_LIMIT.total_seconds()):
                jobs = await self._controller.active_jobs()
        except (ApiError, TimeoutError) as error:
            log.info("the controller's jobs cannot be listed", extra={"error": error})
            await self._tell(RecordsUnavailable())
            return False
        await self._tell(RecordsListed(tuple(wire.record(job) for job in jobs), asked_at, untold))
        return True

    async def list_formations(self) -> None:
        asked_at = self._clock.now()
        try:
            async with asyncio.timeout(LISTING_LIMIT.total_seconds()):
                listed = await self._controller.active_formations()
        except (ApiError, TimeoutError) as error:
            log.info("formations cannot be listed", extra={"error": error})
            await self._tell(RecordsUnavailable())
        else:
            converted = (wire.formation(item) for item in listed)
            await self._tell(FormationsListed(tuple(item for item in converted if item is not None), asked_at))

    async def follow_formations(self) -> None:
        since = ZERO_TIME
        delays = RECONNECT.delays()
        while True:
            newest = since
            try:
                async for item in self._controller.follow_formations(since):
                    formation = wire.formation(item)
                    if formation is None:
                        # Only now is everything up to the newest one known.
                        since = newest
                        self.current.set()
                        delays = RECONNECT.delays()
                        continue
                    newest = max(newest, item.updated_at)
                    if self.current.is_set():
                        since = newest
                    await self._tell(FormationReceived(formation))
            except ApiError as error:
                log.info("formation stream interrupted", extra={"error": error})
            await asyncio.sleep(next(delays))

    async def follow_volumes(self) -> None:
        """Tell what is in the books of volumes, all of it again after each interruption."""
        delays = RECONNECT.delays()
        while True:
            try:
                async for volume in self._controller.follow_volumes():
                    delays = RECONNECT.delays()
                    if not volume.id:
                        await self._tell(VolumesRecorded())
                    elif (record := wire.recorded_volume(volume)) is not None:
                        await self._tell(VolumeRecorded(record))
            except ApiError as error:
                log.debug("volume stream interrupted", extra={"error": error})
            await asyncio.sleep(next(delays))
