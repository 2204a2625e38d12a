"""Apps, their names, metadata and default routes, over HTTP."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from flynn.controller.client import Controller
from flynn.controller.wire import AppUpdate
from flynn.types.app import App
from flynn.types.errors import NotFound, ObjectExists, ValidationError


async def test_a_new_app_gets_defaults_and_a_route(controller: Controller) -> None:
    app = await controller.create_app(App(name="shop"))
    assert (app.strategy, app.deploy_timeout) == ("all-at-once", 120)
    assert app.meta == {"gc.max_inactive_slug_releases": "10"}
    assert await controller.app("shop") == app == await controller.app(app.id)
    [route] = await controller.app_routes("shop")
    assert (route.domain, route.service, route.path, route.drain_backends) == (
        "shop.cluster.test",
        "shop-web",
        "/",
        True,
    )


async def test_a_system_app_gets_no_route(controller: Controller) -> None:
    await controller.create_app(App(name="redis", meta={"flynn-system-app": "true"}))
    assert await controller.app_routes("redis") == []


async def test_a_domain_that_is_taken_does_not_stop_the_app(controller: Controller) -> None:
    from flynn.types.route import Route

    await controller.create_app(App(name="first"))
    await controller.create_route("first", Route(type="http", domain="second.cluster.test", service="first-web",
                                                 drain_backends=True))  # fmt: skip
    await controller.create_app(App(name="second"))
    assert await controller.app_routes("second") == []


async def test_apps_without_a_name_get_different_ones(controller: Controller) -> None:
    apps = await asyncio.gather(*(controller.create_app(App()) for _ in range(8)))
    assert len({app.name for app in apps}) == 8
    assert all(app.name.count("-") == 2 for app in apps)


async def test_ids_may_be_chosen_and_are_unique(controller: Controller) -> None:
    chosen = str(uuid4())
    assert (await controller.create_app(App(id=chosen, name="shop"))).id == chosen
    with pytest.raises(ObjectExists, match="id"):
        await controller.create_app(App(id=chosen, name="other"))
    with pytest.raises(ObjectExists, match='application "shop" already exists'):
        await controller.create_app(App(name="shop"))


async def test_an_app_named_like_an_id_is_found_by_it(controller: Controller) -> None:
    name = str(uuid4())
    app = await controller.create_app(App(name=name))
    assert (await controller.app(name)).id == app.id


@pytest.mark.parametrize(
    "name", ["Shop", "shop_1", "-shop", "shop-", "a--b", "a" * 101, "shöp", "a/b", "a\n", "  "], ids=repr
)
async def test_names_that_could_not_be_host_names_are_refused(controller: Controller, name: str) -> None:
    with pytest.raises(ValidationError):
        await controller.create_app(App(name=name))


@pytest.mark.parametrize(
    "app",
    [App(name="a", strategy="slowly"), App(name="a", deploy_timeout=-1), App(name="a", id="not-an-id")],
    ids=["strategy", "deploy_timeout", "id"],
)
async def test_what_cannot_be_meant_is_refused(controller: Controller, app: App) -> None:
    with pytest.raises(ValidationError):
        await controller.create_app(app)


async def test_an_update_touches_what_it_names_only(controller: Controller) -> None:
    app = await controller.create_app(App(name="shop", meta={"a": "1"}))
    same = await controller.update_app("shop", AppUpdate(strategy="one-by-one"))
    assert (same.meta, same.strategy) == (app.meta, "one-by-one")
    replaced = await controller.update_app("shop", AppUpdate(meta={"b": "2"}, deploy_timeout=7))
    assert (replaced.meta, replaced.deploy_timeout, replaced.strategy) == ({"b": "2"}, 7, "one-by-one")
    assert (await controller.set_app_meta("shop", {})).meta == {}
    assert replaced.updated_at is not None and app.updated_at is not None and replaced.updated_at > app.updated_at


async def test_unknown_apps_are_not_found(controller: Controller) -> None:
    for ref in ("nothing", str(uuid4()), "not%20a%20name", "00000000"):
        with pytest.raises(NotFound):
            await controller.app(ref)


async def test_the_list_is_newest_first(controller: Controller) -> None:
    for name in ("one", "two", "three"):
        await controller.create_app(App(name=name))
    assert [app.name for app in await controller.apps()] == ["three", "two", "one"]
