"""Has the past forgotten, now and then, by whichever worker comes first."""

from __future__ import annotations

import logging
import random
from datetime import timedelta

from flynn.aio.clock import Clock
from flynn.controller.store.retention import Retention
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

EVERY = timedelta(minutes=10)
AT_FIRST = timedelta(minutes=1)  # a start is busy enough


async def forget_regularly(retention: Retention, clock: Clock) -> None:
    """Clean up for ever, at times that differ between workers."""
    pause = AT_FIRST
    while True:
        await clock.sleep(pause * random.uniform(0.8, 1.2))
        pause = EVERY
        try:
            removed = await retention.forget()
        except ApiError as error:
            log.info("the past could not be forgotten", extra={"error": error.message})
        else:
            if removed:
                log.info("forgotten", extra={what.replace(" ", "_"): count for what, count in removed.items()})
