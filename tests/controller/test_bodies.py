"""What clients send that is not what the types say: the raw side of the API."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from flynn.controller.api.parameters import whole_number
from flynn.http.client import HttpClient
from flynn.types.errors import ApiError, BadSyntax, BodyTooBig, ValidationError

from .conftest import Shop, World

JSON = {"Content-Type": "application/json"}


async def post(http: HttpClient, path: str, body: bytes, headers: dict[str, str] = JSON) -> None:
    await http.upload(path, body, method="POST", headers=headers)


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/apps", b"{", BadSyntax),
        ("/apps", b"", BadSyntax),
        ("/apps", b"[]", ValidationError),
        ("/apps", b"null", ValidationError),
        ("/apps", b'"name"', ValidationError),
        ("/apps", b'{"name": 1}', ValidationError),
        ("/apps", b'{"name": "a", "meta": {"a": 1}}', ValidationError),
        ("/apps", b'{"name": "a", "created_at": "yesterday"}', ValidationError),
        ("/apps", b"\xff\xfe", BadSyntax),
        ("/apps", b"[" * 100_000, ApiError),
        ("/apps/shop", b'{"name": "b", "foo": 1}', ValidationError),
        ("/apps/shop", b'{"deploy_timeout": "long"}', ValidationError),
        ("/apps/shop/deploy", b'{"id": "x"}', ValidationError),
        ("/apps/shop/deploy", b"{}", ValidationError),
        ("/releases", b'{"app_id": null}', ValidationError),
        ("/sinks", b'{"kind": "syslog", "config": []}', ValidationError),
        ("/providers", b'{"name": null, "url": null}', ValidationError),
    ],
)
async def test_malformed_bodies_are_refused_with_a_reason(
    world: World, shop: Shop, path: str, body: bytes, error: type[ApiError]
) -> None:
    async with world.http() as http:
        with pytest.raises(error) as refused:
            await post(http, path, body)
        assert refused.value.status == 400 and not refused.value.retry
        await http.get("/ping")


async def test_other_content_types_are_refused(world: World) -> None:
    async with world.http() as http:
        with pytest.raises(ValidationError, match="Content-Type must be application/json"):
            await post(http, "/apps", b"{}", {"Content-Type": "text/plain"})


async def test_a_body_beyond_measure_is_refused(world: World) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"name": "a", "meta": {"a": "'
        for _ in range(90):
            yield b"x" * 100_000
        yield b'"}}'

    async with world.http() as http:
        with pytest.raises(BodyTooBig):
            await http.upload("/apps", body(), method="POST", headers=JSON)


async def test_null_is_the_same_as_absent_but_inside_manifests(world: World, shop: Shop) -> None:
    async with world.http() as http:
        app = await http.post("/apps", {"name": "nulls", "meta": None, "strategy": None}, answer=dict[str, object])
        assert app["strategy"] == "all-at-once"
        release = {
            "app_id": app["id"],
            "env": None,
            "artifacts": None,
            "processes": {"web": {"args": None, "resources": {"memory": {"limit": None}}}},
        }
        await http.post("/releases", release, answer=dict[str, object])
        manifest = {"_type": "x", "rootfs": [{"note": None}]}
        artifact = {"type": "flynn", "uri": "http://x/nulls", "manifest": manifest}
        stored = await http.post("/artifacts", artifact, answer=dict[str, object])
        assert stored["manifest"] == manifest


async def test_unknown_keys_and_what_follows_the_object_are_ignored(world: World) -> None:
    async with world.http() as http:
        await post(http, "/apps", b'{"name": "a", "what": "ever"} trailing')


PATHS_OF_NOTHING = [
    "/releases/x",
    "/artifacts/%00",
    "/deployments/x",
    "/apps/x",
    "/apps/shop/jobs/x",
    "/apps/shop/formations/x",
    "/apps/shop/routes/http/x",
    "/apps/shop/routes/udp/x",
    "/apps/shop/volumes/x",
    "/sinks/x",
    "/providers/x",
    "/apps/%F0%9F%90%98",
    "/apps/a%2Fb",
    "/apps/" + "x" * 3000,
    "/apps/%00",
]


async def test_ids_that_are_none_never_fail_inside(world: World, shop: Shop) -> None:
    async with world.http() as http:
        for path in PATHS_OF_NOTHING:
            with pytest.raises(ApiError) as refused:
                await http.get(path)
            assert refused.value.status in (400, 404), path


@pytest.mark.parametrize("text", ["1", "-1", "0", "9223372036854775807"])
def test_numbers(text: str) -> None:
    assert whole_number("n", text) == int(text)


@pytest.mark.parametrize("text", ["", "x", "1x", "٣", "9223372036854775808", "1" * 5000, "--1"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(ValidationError, match="n must be a number"):
        whole_number("n", text)
