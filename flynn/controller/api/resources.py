"""Providers and resources. spec/controller section 7.8."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.provisioning import Provisioner
from flynn.controller.stores import Stores
from flynn.http.server import Api, Request
from flynn.types.codec import replace
from flynn.types.provider import Provider, Resource, ResourceReq


class ResourcesApi:
    """Endpoints of providers and resources."""

    def __init__(self, stores: Stores, provisioner: Provisioner) -> None:
        self._stores = stores
        self._resources = stores.resources
        self._provisioner = provisioner

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        one = "/providers/{provider}/resources/{resource}"
        for method, path, handler in (
            ("POST", "/providers", self.create_provider),
            ("GET", "/providers", self.providers),
            ("GET", "/providers/{provider}", self.provider),
            ("POST", "/providers/{provider}/resources", self.provision),
            ("GET", "/providers/{provider}/resources", self.of_provider),
            ("GET", "/resources", self.all),
            ("GET", "/apps/{app}/resources", self.of_app),
            ("GET", one, self.get),
            ("PUT", one, self.put),
            ("DELETE", one, self.delete),
            ("PUT", one + "/apps/{app}", self.link),
            ("DELETE", one + "/apps/{app}", self.unlink),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def create_provider(self, request: Request) -> Provider:
        return await self._resources.create_provider(await body_of(request, Provider))

    async def providers(self, request: Request) -> list[Provider]:
        return await self._resources.providers()

    async def provider(self, request: Request) -> Provider:
        return await self._resources.provider(request.path("provider"))

    async def provision(self, request: Request) -> Resource:
        provider = await self._resources.provider(request.path("provider"))
        wanted = await body_of(request, ResourceReq)
        apps = await self._resources.app_ids(wanted.apps)  # first, lest something be made that nobody can have
        made = await self._provisioner.provision(provider, wanted.config)
        return await self._resources.record(
            Resource(provider=provider.id, external_id=made.id, env=made.env, apps=apps)
        )

    async def of_provider(self, request: Request) -> list[Resource]:
        provider = await self._resources.provider(request.path("provider"))
        return await self._resources.all(provider_id=provider.id)

    async def all(self, request: Request) -> list[Resource]:
        return await self._resources.all()

    async def of_app(self, request: Request) -> list[Resource]:
        app = await self._stores.apps.get(request.path("app"))
        return await self._resources.all(app_id=app.id)

    async def get(self, request: Request) -> Resource:
        await self._resources.provider(request.path("provider"))
        return await self._resources.resource(request.path("resource"))

    async def put(self, request: Request) -> Resource:
        provider = await self._resources.provider(request.path("provider"))
        resource = await body_of(request, Resource)
        return await self._resources.record(replace(resource, id=request.path("resource"), provider=provider.id))

    async def delete(self, request: Request) -> Resource:
        await self._resources.provider(request.path("provider"))
        resource = await self._resources.resource(request.path("resource"))
        await self._provisioner.deprovision(await self._resources.provider(resource.provider), resource)
        return await self._resources.forget(resource)

    async def link(self, request: Request) -> Resource:
        await self._resources.provider(request.path("provider"))
        return await self._resources.link(request.path("resource"), request.path("app"))

    async def unlink(self, request: Request) -> Resource:
        await self._resources.provider(request.path("provider"))
        return await self._resources.unlink(request.path("resource"), request.path("app"))
