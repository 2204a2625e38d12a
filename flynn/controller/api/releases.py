"""Releases and artifacts. spec/controller section 7.4."""

from __future__ import annotations

from flynn.controller import validation
from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.manifests import ManifestSource
from flynn.controller.stores import Stores
from flynn.http.server import Api, Request
from flynn.types.artifact import Artifact
from flynn.types.codec import replace
from flynn.types.errors import ValidationError
from flynn.types.release import Release


class ReleasesApi:
    """Endpoints of releases and artifacts."""

    def __init__(self, stores: Stores, manifests: ManifestSource) -> None:
        self._stores = stores
        self._manifests = manifests

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("POST", "/releases", self.create),
            ("GET", "/releases", self.all),
            ("GET", "/releases/{release}", self.get),
            ("GET", "/apps/{app}/releases", self.of_app),
            ("DELETE", "/apps/{app}/releases/{release}", self.delete),
            ("POST", "/artifacts", self.create_artifact),
            ("GET", "/artifacts", self.artifacts),
            ("GET", "/artifacts/{artifact}", self.artifact),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def create(self, request: Request) -> Release:
        return await self._stores.releases.create(await body_of(request, Release))

    async def all(self, request: Request) -> list[Release]:
        return await self._stores.releases.all()

    async def get(self, request: Request) -> Release:
        return await self._stores.releases.get(request.path("release"))

    async def of_app(self, request: Request) -> list[Release]:
        app = await self._stores.apps.get(request.path("app"))
        return await self._stores.releases.all(app.id)

    async def delete(self, request: Request) -> None:
        await self._stores.removal.delete(request.path("app"), request.path("release"))

    async def create_artifact(self, request: Request) -> Artifact:
        artifact = await body_of(request, Artifact)
        validation.required("type", artifact.type)
        validation.required("uri", artifact.uri)
        validation.one_of("type", artifact.type, validation.ARTIFACT_TYPES)
        validation.uri("uri", artifact.uri)
        if artifact.type == "flynn" and not artifact.manifest:
            if artifact.size <= 0:
                raise ValidationError("size", "must be greater than zero")
            artifact = replace(artifact, manifest=await self._manifests.fetch(artifact))
        return await self._stores.artifacts.create(artifact)

    async def artifacts(self, request: Request) -> list[Artifact]:
        return await self._stores.artifacts.all()

    async def artifact(self, request: Request) -> Artifact:
        return await self._stores.artifacts.get(request.path("artifact"))
