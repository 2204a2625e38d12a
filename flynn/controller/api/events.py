"""Events as a list and as a stream. spec/controller section 8.2."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, integer, whole_number
from flynn.controller.ids import is_uuid
from flynn.controller.store.events import EventFilter
from flynn.controller.stores import Stores
from flynn.http.server import Api, EventStream, Request
from flynn.types.errors import NotFound
from flynn.types.event import Event


class EventsApi:
    """Endpoints of events."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        api.route("GET", "/events", self.all, allow=INSIDERS_WITH_KEY)
        api.route("GET", "/events/{event}", self.get, allow=INSIDERS_WITH_KEY)

    async def get(self, request: Request) -> Event:
        return await self._stores.events.get(whole_number("id", request.path("event")))

    async def all(self, request: Request) -> list[Event] | EventStream:
        wanted = EventFilter(
            app_id=await self._app_id(request.query("app_id")),
            object_types=frozenset(filter(None, request.query("object_types").split(","))),
            object_id=request.query("object_id"),
        )
        count = max(0, integer(request, "count") or 0) or None
        if request.header("Accept") == "application/json":
            return await self._stores.events.all(
                wanted,
                before_id=integer(request, "before_id") or None,
                since_id=integer(request, "since_id") or None,
                count=count,
            )
        last_id = whole_number("Last-Event-Id", request.header("Last-Event-Id") or "0")
        past = request.query("past") == "true"
        return EventStream(self._stores.hub.follow(wanted, last_id=max(0, last_id), past=past, count=count))

    async def _app_id(self, ref: str) -> str:
        """Resolve an app; one that has been deleted may still be asked for by its id, to read how it went."""
        if not ref:
            return ""
        try:
            return (await self._stores.apps.get(ref)).id
        except NotFound:
            if is_uuid(ref) and await self._stores.apps.existed(ref):
                return ref
            raise
