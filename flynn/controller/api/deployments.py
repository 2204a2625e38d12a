"""Deployments. spec/controller section 7.7."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.stores import Stores
from flynn.controller.wire import ReleaseRef
from flynn.http.server import Api, Request
from flynn.types.deployment import Deployment


class DeploymentsApi:
    """Endpoints of deployments."""

    def __init__(self, stores: Stores) -> None:
        self._apps = stores.apps
        self._deployments = stores.deployments

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("POST", "/apps/{app}/deploy", self.create),
            ("GET", "/apps/{app}/deployments", self.of_app),
            ("GET", "/deployments/{deployment}", self.get),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def create(self, request: Request) -> Deployment:
        wanted = await body_of(request, ReleaseRef)
        return await self._deployments.create(request.path("app"), wanted.id)

    async def of_app(self, request: Request) -> list[Deployment]:
        app = await self._apps.get(request.path("app"))
        return await self._deployments.all(app.id)

    async def get(self, request: Request) -> Deployment:
        return await self._deployments.get(request.path("deployment"))
