"""The log of an app, from the log aggregator. spec/controller section 7.11."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, integer
from flynn.controller.stores import Stores
from flynn.http.server import Api, EventStream, Request, Streaming
from flynn.logaggregator.client import LogAggregator
from flynn.types.errors import ServiceUnavailable, Unreachable

DEFAULT_STREAMS = "stdout,stderr"


class LogsApi:
    """The log endpoint."""

    def __init__(self, stores: Stores, aggregator: LogAggregator) -> None:
        self._apps = stores.apps
        self._aggregator = aggregator

    def mount(self, api: Api) -> None:
        """Add the endpoint."""
        api.route("GET", "/apps/{app}/log", self.log, allow=INSIDERS_WITH_KEY)

    async def log(self, request: Request) -> Streaming | EventStream:
        app = await self._apps.get(request.path("app"))
        async with AsyncExitStack() as stack:
            try:
                chunks = await stack.enter_async_context(self._aggregator.log(app.id, log_parameters(request)))
            except Unreachable as error:
                raise ServiceUnavailable("the log aggregator cannot be reached", retry=False) from error
            upstream = stack.pop_all()
        if request.accepts_events:
            return EventStream(_events(upstream, chunks))
        return Streaming(_chunks(upstream, chunks), content_type="text/plain")


def log_parameters(request: Request) -> dict[str, str]:
    """Return the query for the aggregator: only what it knows, with the defaults of this API."""
    parameters = {"stream_types": request.query("stream_types") or DEFAULT_STREAMS}
    if request.query("follow") == "true":
        parameters["follow"] = "true"
    if request.query("job_id"):
        parameters["job_id"] = request.query("job_id")
    lines = integer(request, "lines")
    if lines is not None and lines >= 0:
        parameters["lines"] = str(lines)
    if process_types := request.queries("process_type"):
        parameters["process_type"] = process_types[-1]
    return parameters


async def _chunks(upstream: AsyncExitStack, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with upstream:
        async for chunk in chunks:
            yield chunk


async def _events(upstream: AsyncExitStack, chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, object]]:
    async with upstream:
        rest = b""
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield {"event": "message", "data": msgspec.Raw(line)}
        yield {"event": "eof"}
