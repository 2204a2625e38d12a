"""Expiry in a running member, with a clock that runs as fast as it is looked at."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from flynn.discoverd import expiry
from flynn.types.instance import Instance
from tests.discoverd.harness import Place, member, until


class HastyClock:
    """Every sleep takes one turn of the event loop, so that somebody looks for the silent between any two others."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._seconds, UTC)

    def monotonic(self) -> float:
        return self._seconds

    async def sleep(self, duration: timedelta) -> None:
        await asyncio.sleep(0)
        self._seconds += 0.001


async def test_a_registration_does_not_expire_before_whoever_asked_for_it_is_told(place: Place) -> None:
    clock = HastyClock()
    async with member(place, clock=clock) as live:
        await live.create_service("web", "oldest")
        await until(lambda: clock.monotonic() > 2 * expiry.TTL.total_seconds())
        for port in range(1, 30):
            instance = Instance.at(f"10.0.0.1:{port}", "http")
            before = clock.monotonic()
            await live.put_instance("web", instance)
            await live.raft.barrier()  # what somebody may have decided about it meanwhile has happened
            service = live.service("web")
            assert service is not None
            assert instance.id in service.instances or clock.monotonic() - before > expiry.TTL.total_seconds()
