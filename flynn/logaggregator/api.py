"""The HTTP side: reading logs, and what hosts and new instances ask. spec/blobstore-logs.md section B8.1.

A snapshot is all messages as the frames hosts send (the original's gob would only matter to an original aggregator, and
that has no certificate to ask with).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from flynn.aio.clock import Clock
from flynn.http.server import Api, Request, Streaming
from flynn.identity import access
from flynn.logaggregator import lines, rfc5424
from flynn.logaggregator.buffer import MAX_LINES, Filter, Follower, Logs
from flynn.logaggregator.rfc5424 import Message
from flynn.types.errors import ValidationError
from flynn.types.sink import SinkCursor

READERS = access("operator", "host", "app:controller", "app:status", "app:dashboard")
HOSTS = access("operator", "host", "app:logaggregator")

SNAPSHOT_TYPE = "application/vnd.flynn.syslog-frames"
FLUSH_SECONDS = 0.05
BATCH = 500  # lines per write: more would keep other readers waiting


def logaggregator_api(logs: Logs, clock: Clock) -> Api:
    """Return the API over `logs`."""
    handlers = _Handlers(logs, clock)
    api = Api("logaggregator")
    api.route("GET", "/log/{app}", handlers.log, allow=READERS)
    api.route("GET", "/cursors", handlers.cursors, allow=HOSTS)
    api.route("GET", "/snapshot", handlers.snapshot, allow=HOSTS)
    return api


class _Handlers:
    def __init__(self, logs: Logs, clock: Clock) -> None:
        self._logs = logs
        self._clock = clock

    async def log(self, request: Request) -> Streaming:
        app, wanted, last = request.path("app"), _filter(request), _lines(request)
        follow = request.query("follow") == "true"
        body = self._following(app, wanted, last) if follow else self._history(app, wanted, last)
        return Streaming(body, "text/plain; charset=utf-8")

    async def cursors(self, request: Request) -> dict[str, SinkCursor]:
        return {host: SinkCursor(time=time, seq=seq) for host, (time, seq) in self._logs.cursors.items()}

    async def snapshot(self, request: Request) -> Streaming:
        return Streaming(self._snapshot(), SNAPSHOT_TYPE)

    async def _history(self, app: str, wanted: Filter, last: int) -> AsyncIterator[bytes]:
        async for piece in _written(self._logs.read(app, wanted, last)):
            yield piece

    async def _following(self, app: str, wanted: Filter, last: int) -> AsyncIterator[bytes]:
        news = asyncio.Event()
        follower = Follower(wanted, news.set)
        # Nothing can arrive between these two, so there is neither gap nor repetition.
        history = self._logs.read(app, wanted, last) if last else []
        self._logs.follow(app, follower)
        try:
            async for piece in _written(history):
                yield piece
            while True:
                await news.wait()
                news.clear()
                messages, dropped = follower.take()
                async for piece in _written(messages):
                    yield piece
                if dropped:
                    yield lines.missed(dropped, self._clock.now())
                await asyncio.sleep(FLUSH_SECONDS)
        finally:
            self._logs.unfollow(app, follower)

    async def _snapshot(self) -> AsyncIterator[bytes]:
        batch: list[bytes] = []
        for message in self._logs.everything():
            batch.append(rfc5424.frame(rfc5424.encode(message)))
            if len(batch) == BATCH:
                yield b"".join(batch)
                batch.clear()
        yield b"".join(batch)


async def _written(messages: Iterable[Message]) -> AsyncIterator[bytes]:
    batch: list[bytes] = []
    for message in messages:
        batch.append(lines.line(message))
        if len(batch) == BATCH:
            yield b"".join(batch)
            batch.clear()
            await asyncio.sleep(0)
    if batch:
        yield b"".join(batch)


def _filter(request: Request) -> Filter:
    types = request.queries("process_type")
    streams = request.query("stream_types")
    return Filter(
        job_id=request.query("job_id") or None,
        process_type=types[-1] if types else None,
        streams=frozenset(streams.split(",")) if streams else None,
    )


def _lines(request: Request) -> int:
    text = request.query("lines")
    if not text:
        return 0
    digits = text.removeprefix("-").removeprefix("+")
    if not digits.isascii() or not digits.isdigit() or len(text) - len(digits) > 1:
        raise ValidationError("lines", f'strconv.Atoi: parsing "{text}": invalid syntax')
    if not 0 <= int(text[:20]) <= MAX_LINES:
        raise ValidationError("lines", f"lines must be an integer between 0 and {MAX_LINES}")
    return int(text)
