"""Formations and scale requests. spec/controller sections 7.5 and 8.3."""

from __future__ import annotations

from datetime import datetime

from flynn.controller import validation
from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of, moment
from flynn.controller.api.streams import state_stream
from flynn.controller.stores import Stores
from flynn.http.server import Api, EventStream, Request
from flynn.types.codec import convert, replace
from flynn.types.errors import NotFound, ValidationError
from flynn.types.event import Event, EventType
from flynn.types.formation import ExpandedFormation, Formation, ScaleRequest, ScaleState


class FormationsApi:
    """Endpoints of formations and scale requests."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("GET", "/formations", self.everywhere),
            ("GET", "/apps/{app}/formations", self.of_app),
            ("GET", "/apps/{app}/formations/{release}", self.get),
            ("PUT", "/apps/{app}/formations/{release}", self.put),
            ("DELETE", "/apps/{app}/formations/{release}", self.delete),
            ("PUT", "/apps/{app}/scale/{release}", self.scale),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def everywhere(self, request: Request) -> list[ExpandedFormation] | EventStream:
        if request.accepts_events:
            since = moment(request, "since")
            return EventStream(
                state_stream(
                    self._stores.hub,
                    lambda: self._stores.formations.changed_since(since),
                    ExpandedFormation(),
                    self._changed,
                    _updated_at,
                )
            )
        if request.query("active") != "true":
            raise ValidationError("", "must either request a stream or only active formations")
        return await self._stores.formations.active()

    async def _changed(self, event: Event) -> ExpandedFormation | None:
        if event.object_type != EventType.SCALE_REQUEST:
            return None
        request = convert(event.data, ScaleRequest)
        formation = await self._stores.formations.expanded(request.app, request.release, deleted=True)
        return replace(formation, processes=None) if formation is not None and formation.deleted else formation

    async def of_app(self, request: Request) -> list[Formation]:
        app = await self._stores.apps.get(request.path("app"))
        return await self._stores.formations.all(app.id)

    async def get(self, request: Request) -> Formation | ExpandedFormation:
        app = await self._stores.apps.get(request.path("app"))
        release = request.path("release")
        if request.query("expand") != "true":
            return await self._stores.formations.get(app.id, release)
        formation = await self._stores.formations.expanded(app.id, release)
        if formation is None:
            raise NotFound(f"no formation of release {release}")
        return formation

    async def put(self, request: Request) -> Formation:
        wanted = await body_of(request, Formation)
        return await self._stores.formations.put(
            request.path("app"), request.path("release"), wanted.processes, wanted.tags
        )

    async def delete(self, request: Request) -> None:
        await self._stores.formations.delete(request.path("app"), request.path("release"))

    async def scale(self, request: Request) -> ScaleRequest:
        wanted = await body_of(request, ScaleRequest)
        validation.scale_state(wanted.state)
        if wanted.state == ScaleState.PENDING:
            return await self._stores.formations.scale(
                request.path("app"), request.path("release"), wanted.new_processes, wanted.new_tags
            )
        return await self._stores.formations.set_scale_state(wanted)


def _updated_at(formation: ExpandedFormation) -> datetime | None:
    return formation.updated_at
