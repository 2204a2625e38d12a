"""Apps and their current release. spec/controller section 7.3."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.stores import Stores
from flynn.controller.validation import known_keys
from flynn.controller.wire import AppUpdate, ReleaseRef
from flynn.http.server import Api, Request
from flynn.types.app import App
from flynn.types.codec import convert
from flynn.types.errors import NotFound, ValidationError
from flynn.types.release import Release

UPDATABLE_KEYS = frozenset(App.__struct_fields__) | {"protected"}


class AppsApi:
    """Endpoints below /apps that concern the app itself."""

    def __init__(self, stores: Stores) -> None:
        self._apps = stores.apps
        self._releases = stores.releases

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("POST", "/apps", self.create),
            ("GET", "/apps", self.all),
            ("GET", "/apps/{app}", self.get),
            ("POST", "/apps/{app}", self.update),
            ("POST", "/apps/{app}/meta", self.update),
            ("DELETE", "/apps/{app}", self.delete),
            ("POST", "/apps/{app}/gc", self.collect_garbage),
            ("GET", "/apps/{app}/release", self.current_release),
            ("PUT", "/apps/{app}/release", self.set_current_release),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def create(self, request: Request) -> App:
        return await self._apps.create(await body_of(request, App))

    async def all(self, request: Request) -> list[App]:
        return await self._apps.all()

    async def get(self, request: Request) -> App:
        return await self._apps.get(request.path("app"))

    async def update(self, request: Request) -> App:
        document = await request.body(dict[str, object])
        known_keys(document, UPDATABLE_KEYS)
        applied = {key: value for key, value in document.items() if key in AppUpdate.__struct_fields__}
        update = convert(applied, AppUpdate)
        if update.strategy == "":
            raise ValidationError("strategy", "must not be empty")
        return await self._apps.update(request.path("app"), update)

    async def delete(self, request: Request) -> None:
        await self._apps.request_deletion(request.path("app"))

    async def collect_garbage(self, request: Request) -> None:
        await self._apps.request_garbage_collection(request.path("app"))

    async def current_release(self, request: Request) -> Release:
        app = await self._apps.get(request.path("app"))
        if not app.release:
            raise NotFound(f"app {app.name} has no release")
        return await self._releases.get(app.release)

    async def set_current_release(self, request: Request) -> Release:
        wanted = await body_of(request, ReleaseRef)
        return await self._apps.set_release(request.path("app"), wanted.id)
