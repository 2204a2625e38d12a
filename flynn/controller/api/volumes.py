"""Volumes and log sinks. spec/controller section 7.10."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of, moment
from flynn.controller.api.streams import state_stream
from flynn.controller.stores import Stores
from flynn.http.server import Api, EventStream, Request
from flynn.types.codec import convert
from flynn.types.event import Event, EventType
from flynn.types.sink import Sink
from flynn.types.volume import Volume


class VolumesApi:
    """Endpoints of volumes."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._volumes = stores.volumes

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("GET", "/volumes", self.all),
            ("PUT", "/volumes/{volume}", self.put),
            ("GET", "/apps/{app}/volumes", self.of_app),
            ("GET", "/apps/{app}/volumes/{volume}", self.get),
            ("PUT", "/apps/{app}/volumes/{volume}/decommission", self.decommission),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def all(self, request: Request) -> list[Volume] | EventStream:
        if not request.accepts_events:
            return await self._volumes.all()
        since = moment(request, "since")
        return EventStream(
            state_stream(
                self._stores.hub,
                lambda: self._volumes.changed_since(since),
                Volume(),
                _volume_of,
                lambda volume: volume.updated_at,
            )
        )

    async def put(self, request: Request) -> Volume:
        return await self._volumes.put(await body_of(request, Volume))

    async def of_app(self, request: Request) -> list[Volume]:
        app = await self._stores.apps.get(request.path("app"))
        return await self._volumes.all(app.id)

    async def get(self, request: Request) -> Volume:
        app = await self._stores.apps.get(request.path("app"))
        return await self._volumes.get(app.id, request.path("volume"))

    async def decommission(self, request: Request) -> Volume:
        app = await self._stores.apps.get(request.path("app"))
        volume = await body_of(request, Volume)
        return await self._volumes.decommission(app.id, volume.id or request.path("volume"))


class SinksApi:
    """Endpoints of log sinks."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._sinks = stores.sinks

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("POST", "/sinks", self.create),
            ("GET", "/sinks", self.all),
            ("GET", "/sinks/{sink}", self.get),
            ("DELETE", "/sinks/{sink}", self.delete),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def create(self, request: Request) -> Sink:
        return await self._sinks.create(await body_of(request, Sink))

    async def all(self, request: Request) -> list[Sink] | EventStream:
        if not request.accepts_events:
            return await self._sinks.all()
        since = moment(request, "since")
        return EventStream(
            state_stream(
                self._stores.hub,
                lambda: self._sinks.changed_since(since),
                Sink(),
                _sink_of,
                lambda sink: sink.updated_at,
            )
        )

    async def get(self, request: Request) -> Sink:
        return await self._sinks.get(request.path("sink"))

    async def delete(self, request: Request) -> Sink:
        return await self._sinks.delete(request.path("sink"))


async def _volume_of(event: Event) -> Volume | None:
    return convert(event.data, Volume) if event.object_type == EventType.VOLUME else None


async def _sink_of(event: Event) -> Sink | None:
    return convert(event.data, Sink) if event.object_type in (EventType.SINK, EventType.SINK_DELETION) else None
