"""Releases and artifacts over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from flynn.controller.client import Controller
from flynn.controller.manifests import BadManifest, verify
from flynn.http.client import HttpClient
from flynn.http.server import Api, Raw, Request, listen
from flynn.identity import ANYONE
from flynn.types.artifact import Artifact
from flynn.types.codec import encode, sha512_256
from flynn.types.errors import NotFound, ObjectExists, Unauthorized, ValidationError
from flynn.types.release import Port, ProcessType, Release, VolumeReq
from flynn.types.resources import DEFAULTS, Limit

from .conftest import MANIFEST, Shop, World


async def test_a_release_is_stored_with_limits_and_translated_legacy_keys(controller: Controller, shop: Shop) -> None:
    release = await controller.create_release(
        Release(
            app_id=shop.app.id,
            artifact=shop.artifact.id,
            env={"A": "1"},
            processes={
                "web": ProcessType(
                    entrypoint=["/start"], cmd=["web"], data=True, resources={"memory": Limit(limit=256)}
                )
            },
        )
    )
    stored = await controller.release(release.id)
    web = stored.processes["web"]
    assert web.args == ["/start", "web"]
    assert web.volumes == [VolumeReq(path="/data")]
    assert web.resources == {**DEFAULTS, "memory": Limit(request=256, limit=256)}
    assert (stored.artifacts, stored.artifact) == ([shop.artifact.id], shop.artifact.id)


async def test_lists_are_newest_first_and_by_app(controller: Controller, shop: Shop) -> None:
    second = await controller.create_release(Release(app_id=shop.app.id))
    assert [release.id for release in await controller.app_releases("shop")] == [second.id, shop.release.id]
    assert len(await controller.releases()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"app_id": "nonsense"}, "app_id", id="app id is no UUID"),
        pytest.param({"app_id": str(uuid4())}, "names no app", id="unknown app"),
        pytest.param({"artifacts": [str(uuid4())]}, "names no artifact", id="unknown artifact"),
        pytest.param({"artifacts": ["x"]}, "artifacts", id="artifact id is no UUID"),
        pytest.param({"env": {"": "x"}}, 'tried to set ""="x"', id="variable without a name"),
        pytest.param({"processes": {"web": ProcessType(ports=[Port(port=70000, proto="tcp")])}}, "port", id="port"),
        pytest.param({"processes": {"web": ProcessType(ports=[Port(port=80, proto="icmp")])}}, "icmp", id="protocol"),
        pytest.param(
            {"processes": {"db": ProcessType(volumes=[VolumeReq(path="/data", size=1000)])}},
            "cannot hold 1000 bytes",
            id="a volume too small for a file system",
        ),
        pytest.param({"env": {"A": "a\0b"}}, "env", id="NUL in a value"),
        pytest.param({"meta": {"a": "\0"}}, "validation_error", id="NUL in the metadata"),
    ],
)
async def test_bad_releases_are_the_clients_mistake(
    controller: Controller, shop: Shop, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        await controller.create_release(Release(**{"app_id": shop.app.id, **change}))  # type: ignore[arg-type]
    assert not refused.value.retry


async def test_an_id_can_be_chosen_once(controller: Controller, shop: Shop) -> None:
    chosen = str(uuid4())
    assert (await controller.create_release(Release(id=chosen, app_id=shop.app.id))).id == chosen
    with pytest.raises(ObjectExists):
        await controller.create_release(Release(id=chosen, app_id=shop.app.id))


async def test_setting_the_release_makes_no_formation(controller: Controller, shop: Shop) -> None:
    with pytest.raises(NotFound):
        await controller.app_release("shop")
    await controller.set_app_release("shop", shop.release.id)
    assert (await controller.app_release("shop")).id == shop.release.id
    assert await controller.formations("shop") == []
    unknown = str(uuid4())
    with pytest.raises(ValidationError, match=f"could not find release with ID {unknown}"):
        await controller.set_app_release("shop", unknown)


async def test_deleting_a_release(controller: Controller, shop: Shop) -> None:
    await controller.set_app_release("shop", shop.release.id)
    with pytest.raises(ValidationError, match="cannot delete current app release"):
        await controller.delete_release("shop", shop.release.id)
    other = await controller.create_release(Release(app_id=shop.app.id, artifacts=[shop.artifact.id]))
    deleted = await controller.delete_release("shop", other.id)
    assert (deleted.app, deleted.release, deleted.deleted_files) == (shop.app.id, other.id, None)
    with pytest.raises(NotFound):
        await controller.release(other.id)
    assert (await controller.artifact(shop.artifact.id)).id == shop.artifact.id, "the current release still has it"


async def test_the_same_uri_is_the_same_artifact(controller: Controller, shop: Shop) -> None:
    again = await controller.create_artifact(Artifact(type="flynn", uri=shop.artifact.uri, manifest={"other": 1}))
    assert (again.id, again.manifest) == (shop.artifact.id, MANIFEST)
    assert again.layer_url_template == "file:///l/{id}"


@pytest.mark.parametrize(
    "artifact",
    [
        Artifact(uri="http://x/y"),
        Artifact(type="flynn", manifest={}),
        Artifact(type="tarball", uri="http://x/y"),
        Artifact(type="flynn", uri="http://x/y"),
        Artifact(type="flynn", uri="not a uri", manifest={"a": 1}),
        Artifact(type="file", uri="http://x/y", id="nonsense"),
    ],
    ids=["no type", "no uri", "unknown type", "no manifest and no size", "bad uri", "bad id"],
)
async def test_bad_artifacts_are_refused(controller: Controller, artifact: Artifact) -> None:
    with pytest.raises(ValidationError):
        await controller.create_artifact(artifact)


@pytest.fixture
async def image_server() -> AsyncIterator[str]:
    api = Api("images")

    async def serve(request: Request) -> Raw:
        if request.path("name") == "broken":
            return Raw("", status=500)
        return Raw(encode(MANIFEST), "application/json")

    api.route("GET", "/{name}", serve, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        yield f"http://{host}:{port}"


async def test_a_manifest_is_fetched_and_verified(controller: Controller, image_server: str) -> None:
    raw = encode(MANIFEST)
    good = Artifact(
        type="flynn",
        uri=f"{image_server}/good",
        size=len(raw),
        hashes={"sha512_256": sha512_256(raw), "whirlpool": "unknown kinds do not matter"},
    )
    assert (await controller.create_artifact(good)).manifest == MANIFEST
    for name, size in (("broken", len(raw)), ("short", len(raw) + 1)):
        with pytest.raises(ValidationError, match="failed to download from"):
            await controller.create_artifact(
                Artifact(type="flynn", uri=f"{image_server}/{name}", size=size, hashes=good.hashes)
            )


@pytest.mark.parametrize(
    ("raw", "size", "hashes", "reason"),
    [
        (b"abc", 3, {}, "no hashes provided"),
        (b"abc", 3, {"md5": "x"}, "no hashes provided"),
        (b"ab", 3, {"sha256": "x"}, "data too short"),
        (b"abcd", 3, {"sha256": "x"}, "data too long"),
        (b"abc", 3, {"sha256": "00"}, 'expected sha256 hash "00"'),
    ],
)
def test_what_is_wrong_with_a_manifest(raw: bytes, size: int, hashes: dict[str, str], reason: str) -> None:
    with pytest.raises(BadManifest, match=reason):
        verify(raw, size, hashes)
    verify(b"abc", 3, {"sha256": hashlib.sha256(b"abc").hexdigest()})


async def test_the_wire_form_of_refusals(world: World, shop: Shop) -> None:
    """404 and 401 have no body; everything else says whether a repetition makes sense."""
    async with world.http() as http:
        for path in ("/apps/none", "/releases/xyz", "/artifacts/xyz", f"/deployments/{uuid4()}", "/events/99999"):
            with pytest.raises(NotFound, match="resource not found"):  # the client's words for an empty body
                await http.get(path)
        with pytest.raises(NotFound, match="404 page not found"):
            await http.get("/nothing/of/the/kind")
    async with world.http(key="wrong") as http:
        with pytest.raises(Unauthorized):
            await http.get("/apps")
        with pytest.raises(Unauthorized):
            await http.get("/nothing/of/the/kind")


async def test_who_is_let_in(world: World) -> None:
    """A certificate is needed for the connection and the key for everything but what must work without."""

    async def allowed(http: HttpClient, path: str) -> bool:
        try:
            async with http:
                await http.get(path)
        except Unauthorized:
            return False
        return True

    assert await allowed(world.http(key="the-next-key"), "/apps")
    assert not await allowed(world.http(key=None), "/apps")
    assert not await allowed(world.http(key=""), "/apps")
    assert await allowed(world.http(key=None), "/ping")
    assert await allowed(world.http(key=None), "/ca-cert")
    assert not await allowed(world.http(key="wrong"), "/ca-cert")
    assert not await allowed(world.http(key=None), "/.well-known/status")
    assert await allowed(world.http(), "/.well-known/status")
    assert await allowed(world.http(key=None, app="status"), "/.well-known/status")
