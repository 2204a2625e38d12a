"""Log sinks that operators set up once for the cluster, brought to every host. No job depends on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from flynn.aio.backoff import Backoff
from flynn.scheduler.host_links import HostLinks
from flynn.scheduler.model import HostID
from flynn.scheduler.neighbours import ControllerApi, HostApi
from flynn.types.codec import ZERO_TIME
from flynn.types.errors import ApiError, NotFound
from flynn.types.sink import Sink, SinkInfo

log = logging.getLogger(__name__)

RECONNECT = Backoff(first=timedelta(milliseconds=100), limit=timedelta(seconds=3))
HOST_LIMIT = timedelta(seconds=10)


def differences(wanted: Mapping[str, Sink], present: Iterable[Sink]) -> tuple[list[Sink], list[str]]:
    """Which sinks a host has to be given, and which (by id) it has to drop. Its own are its own affair."""
    mine = {sink.id: sink for sink in present if not sink.host_managed}
    missing = [
        sink
        for sink in wanted.values()
        if sink.id not in mine or (mine[sink.id].kind, mine[sink.id].config) != (sink.kind, sink.config)
    ]
    return missing, [id for id in mine if id not in wanted]


class SinkKeeper:
    def __init__(
        self, controller: ControllerApi, hosts: HostLinks, leads: Callable[[], bool], changed: asyncio.Event
    ) -> None:
        self._controller = controller
        self._hosts = hosts
        self._leads = leads
        self._changed = changed  # set by us when other sinks are wanted
        self._wanted: dict[str, Sink] | None = None  # not known yet: then nothing is dropped either

    async def follow(self) -> None:
        """Know which sinks there should be, for ever."""
        delays = RECONNECT.delays()
        while True:
            listed: dict[str, Sink] = {}
            try:
                async for sink in self._controller.follow_sinks(ZERO_TIME):
                    delays = RECONNECT.delays()
                    if not sink.id:
                        self._wanted = listed  # whatever was removed while we did not listen is not in it
                    elif sink.config is None:
                        listed.pop(sink.id, None)
                    else:
                        listed[sink.id] = sink
                    self._changed.set()
            except ApiError as error:
                log.debug("sink stream interrupted", extra={"error": error})
            await asyncio.sleep(next(delays))

    async def bring(self) -> None:
        """Give every host what it lacks."""
        if self._wanted is None or not self._leads():
            return
        async with asyncio.TaskGroup() as group:
            for host, api in self._hosts.connected():
                group.create_task(self._bring_to(host, api, dict(self._wanted)), name=f"sinks of {host}")

    async def _bring_to(self, host: HostID, api: HostApi, wanted: Mapping[str, Sink]) -> None:
        try:
            async with asyncio.timeout(HOST_LIMIT.total_seconds()):
                missing, surplus = differences(wanted, await api.sinks())
                for id in surplus:
                    await _drop(api, id)
                for sink in missing:
                    await api.put_sink(SinkInfo(id=sink.id, kind=sink.kind, config=sink.config))
        except (ApiError, TimeoutError) as error:
            # Once a minute all of it is looked at again.
            log.info("sinks not brought to a host", extra={"host": host, "error": error})
            return
        if missing or surplus:
            log.info("sinks brought to a host", extra={"host": host, "new": len(missing), "gone": len(surplus)})


async def _drop(api: HostApi, id: str) -> None:
    try:
        await api.delete_sink(id)
    except NotFound:
        pass
