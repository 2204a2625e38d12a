"""Routes. spec/controller section 7.9."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.store.routes import parent_of
from flynn.controller.stores import Stores
from flynn.http.server import Api, Request
from flynn.types.codec import replace
from flynn.types.route import Route


class RoutesApi:
    """Endpoints of routes."""

    def __init__(self, stores: Stores) -> None:
        self._apps = stores.apps
        self._routes = stores.routes

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        one = "/apps/{app}/routes/{type}/{route}"
        for method, path, handler in (
            ("GET", "/routes", self.all),
            ("GET", "/apps/{app}/routes", self.of_app),
            ("POST", "/apps/{app}/routes", self.create),
            ("GET", one, self.get),
            ("PUT", one, self.update),
            ("DELETE", one, self.delete),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def _parent(self, request: Request) -> str:
        return parent_of((await self._apps.get(request.path("app"))).id)

    async def all(self, request: Request) -> list[Route]:
        return await self._routes.all()

    async def of_app(self, request: Request) -> list[Route]:
        return await self._routes.all(await self._parent(request))

    async def create(self, request: Request) -> Route:
        parent = await self._parent(request)
        return await self._routes.create(replace(await body_of(request, Route), parent_ref=parent))

    async def get(self, request: Request) -> Route:
        return await self._routes.get(await self._parent(request), request.path("type"), request.path("route"))

    async def update(self, request: Request) -> Route:
        parent = await self._parent(request)
        route = await body_of(request, Route)
        return await self._routes.update(parent, request.path("type"), request.path("route"), route)

    async def delete(self, request: Request) -> None:
        await self._routes.delete(await self._parent(request), request.path("type"), request.path("route"))
