"""The places this host's logs go to: every logaggregator there is, and what operators have set up."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from flynn.aio.backoff import Backoff
from flynn.aio.supervisor import TaskSet
from flynn.host import state
from flynn.host.discovery import Discovery
from flynn.host.logs import syslog
from flynn.host.logs.files import LogDirectory
from flynn.host.logs.record import Cursor
from flynn.host.logs.shipping import Shipment
from flynn.host.logs.syslog import FindJob, SyslogConfig, Target
from flynn.host.state import StateStore
from flynn.http.connection import RawConnection
from flynn.identity import Identity
from flynn.logaggregator import client as logaggregator
from flynn.types.codec import replace
from flynn.types.errors import ApiError, NotFound, ServiceUnavailable, Unreachable, ValidationError
from flynn.types.instance import EventKind, Instance
from flynn.types.sink import Sink, SinkCursor, SinkInfo

log = logging.getLogger(__name__)

LOGAGGREGATOR, SYSLOG = "logaggregator", "syslog"
RECONNECT = Backoff(first=timedelta(milliseconds=200), factor=2, limit=timedelta(seconds=10))
DIAL_SECONDS = 10.0
WRITE_SECONDS = 30.0  # a sink that takes nothing for so long is connected to again
SAVE_CURSOR_SECONDS = 10.0
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Sinks:
    """All sinks of a host, each followed by a task of its own."""

    def __init__(
        self,
        *,
        host_id: str,
        store: StateStore,
        logs: LogDirectory,
        discovery: Discovery,
        identity: Identity,
        find: FindJob,
        tasks: TaskSet,
    ) -> None:
        self._host_id, self._store, self._logs, self._discovery = host_id, store, logs, discovery
        self._identity, self._find, self._tasks = identity, find, tasks
        self._sinks: dict[str, SinkInfo] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._aggregators: dict[str, Instance] = {}  # by the id of their sink

    def restore(self) -> None:
        """Start the sinks recorded by an earlier daemon; those of discoverd announce themselves again."""
        for sink in self._store.sinks():
            self._begin(sink)

    def all(self) -> list[Sink]:
        return [
            Sink(id=sink.id, kind=sink.kind, host_managed=sink.host_managed, config=sink.config)
            for sink in self._sinks.values()
        ]

    async def put(self, sink: SinkInfo) -> SinkInfo:
        """Create or change a sink; on the disk when this returns. Raises `ValidationError`."""
        _check(sink)
        known = self._sinks.get(sink.id)
        if known is not None and (known.kind, known.config) == (sink.kind, sink.config):
            return known
        if known is not None and sink.cursor is None:
            sink = replace(sink, cursor=known.cursor)  # what has been sent is not sent again, wherever it goes now
        try:
            await self._store.commit(state.save_sink(sink), durable=True)
        except sqlite3.Error as error:
            raise ServiceUnavailable(f"the sink could not be recorded: {error}") from error
        self._end(sink.id)
        self._begin(sink)
        return sink

    async def delete(self, sink_id: str) -> None:
        """Raises `NotFound`."""
        if sink_id not in self._sinks:
            raise NotFound("sink with that id couldn't be found")
        self._end(sink_id)
        await self._store.commit(state.forget_sink(sink_id), durable=True)

    def _begin(self, sink: SinkInfo) -> None:
        self._sinks[sink.id] = sink
        self._running[sink.id] = self._tasks.start(f"sink {sink.id}", self._ship(sink.id))

    def _end(self, sink_id: str) -> None:
        self._sinks.pop(sink_id, None)
        task = self._running.pop(sink_id, None)
        if task is not None:
            task.cancel()

    # Shipping

    async def _ship(self, sink_id: str) -> NoReturn:
        """Send to one sink for ever, connecting again whenever the connection breaks."""
        delays = RECONNECT.delays()
        while True:
            try:
                if self._sinks[sink_id].kind == LOGAGGREGATOR:
                    await self._ship_to_aggregator(sink_id)
                else:
                    await self._ship_to_syslog(sink_id)
                delays = RECONNECT.delays()
            except (ApiError, OSError, TimeoutError) as error:
                log.info("sink not reached", extra={"sink": sink_id, "error": str(error)})
            await asyncio.sleep(next(delays))

    async def _ship_to_aggregator(self, sink_id: str) -> None:
        instance = self._aggregators[sink_id]
        async with logaggregator.at(instance, self._identity) as aggregator:
            cursors = await aggregator.cursors()
        after = _cursor_of(cursors.get(self._host_id))
        async with logaggregator.sending(instance, self._identity) as connection:
            await self._stream(connection, Shipment(self._logs, after), None, None)

    async def _ship_to_syslog(self, sink_id: str) -> None:
        sink = self._sinks[sink_id]
        config, target = syslog.read(sink.config)
        async with _dialled(target, config) as connection:
            await self._stream(connection, Shipment(self._logs, _cursor_of(sink.cursor)), config, sink_id)

    async def _stream(
        self, connection: RawConnection, shipment: Shipment, config: SyslogConfig | None, sink_id: str | None
    ) -> None:
        """Send batches until the other side goes. With a `sink_id` the progress is kept on our side."""
        gone = asyncio.ensure_future(connection.read(1))  # sinks do not speak: whatever comes, it is the end
        saved = asyncio.get_running_loop().time()
        try:
            async with aclosing(shipment.batches()) as batches:
                while True:
                    following = asyncio.ensure_future(anext(batches))
                    try:
                        await asyncio.wait((gone, following), return_when=asyncio.FIRST_COMPLETED)
                        if not following.done():
                            return
                    finally:
                        if not following.done():
                            following.cancel()
                            await asyncio.gather(following, return_exceptions=True)
                    batch = following.result()
                    if config is None:
                        data = b"".join([b"%d %s" % (len(record.message), record.message) for record in batch])
                    else:
                        data = b"".join([syslog.line(record, config, self._find) for record in batch])
                    connection.write(data)
                    async with asyncio.timeout(WRITE_SECONDS):
                        await connection.drain()
                    if sink_id is not None:
                        saved = self._remember(sink_id, batch[-1].cursor, saved)
        finally:
            gone.cancel()
            shipment.close()
            if sink_id is not None and sink_id in self._sinks:
                # Also when the daemon leaves: the next one begins behind what has been sent.
                self._store.commit(state.save_sink(self._sinks[sink_id])).add_done_callback(_ignore_failure)

    def _remember(self, sink_id: str, cursor: Cursor, saved: float) -> float:
        moment = SinkCursor(time=EPOCH + timedelta(microseconds=cursor[0]), seq=cursor[1])
        self._sinks[sink_id] = replace(self._sinks[sink_id], cursor=moment)
        now = asyncio.get_running_loop().time()
        if now - saved < SAVE_CURSOR_SECONDS:
            return saved
        self._store.commit(state.save_sink(self._sinks[sink_id])).add_done_callback(_ignore_failure)
        return now

    async def follow_aggregators(self) -> NoReturn:
        """Have one sink for each logaggregator there is."""
        await self._discovery.connected.wait()
        while True:
            try:
                async with aclosing(self._discovery.registry.watch(logaggregator.SERVICE)) as events:
                    async for event in events:
                        if event.instance is None:
                            continue
                        if event.kind is EventKind.DOWN:
                            self._end(event.instance.addr)
                        elif event.kind in (EventKind.UP, EventKind.UPDATE):
                            self._found(event.instance)
            except ApiError as error:
                log.warning("lost sight of the logaggregators", extra={"error": str(error)})
            await asyncio.sleep(1)

    def _found(self, instance: Instance) -> None:
        # Not recorded: discoverd knows them, and the next daemon asks it again.
        known, self._aggregators[instance.addr] = self._aggregators.get(instance.addr), instance
        if instance.addr not in self._sinks or known is None or known.meta != instance.meta:
            config = {"addr": instance.addr}
            self._end(instance.addr)
            self._begin(SinkInfo(id=instance.addr, kind=LOGAGGREGATOR, config=config, host_managed=True))


def _check(sink: SinkInfo) -> None:
    if not sink.id:
        raise ValidationError("id", "must be set")
    match sink.kind:
        case "syslog":
            syslog.read(sink.config)
        case _:
            raise ValidationError("kind", f'"{sink.kind}" is not known')


def _cursor_of(cursor: SinkCursor | None) -> Cursor:
    return ((cursor.time - EPOCH) // timedelta(microseconds=1), cursor.seq) if cursor is not None else (0, 0)


@asynccontextmanager
async def _dialled(target: Target, config: SyslogConfig) -> AsyncIterator[RawConnection]:
    context: ssl.SSLContext | None = None
    if target.tls:
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"syslog at {target.host}:{target.port}: {error or 'no answer in time'}") from error
    async with RawConnection(reader, writer) as connection:
        yield connection


def _ignore_failure(done: asyncio.Future[None]) -> None:
    """A cursor that could not be written costs some repeated lines after a restart; the store has logged it."""
    if not done.cancelled():
        done.exception()
