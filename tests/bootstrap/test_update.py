"""An update of the apps, on a real controller with its worker; the scheduler obeys, or lets jobs crash."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from flynn.bootstrap.cluster import BootstrapError
from flynn.bootstrap.update import Renewal
from flynn.controller.client import Controller
from flynn.types.app import SYSTEM_APP, App
from flynn.types.artifact import Artifact, ImageManifest, Layer, Rootfs
from flynn.types.formation import Formation
from flynn.types.release import ProcessType, Release
from tests.controller.conftest import conninfo, controller, identities, postgres_server, stores, world
from tests.controller.test_deployments import Scheduler, scheduler, working

__all__ = ["conninfo", "controller", "identities", "postgres_server", "scheduler", "stores", "world"]

pytestmark = pytest.mark.slow

COMPONENTS = ("router", "gitreceive", "slugbuilder", "slugrunner")


def image(component: str, version: int) -> Artifact:
    layer = Layer(
        id=f"{component}-{version}",
        type="application/vnd.flynn.image.squashfs.v1",
        length=1,
        hashes={"sha512_256": "0" * 64},
    )
    manifest = ImageManifest(rootfs=[Rootfs(layers=[layer])])
    return Artifact(
        type="flynn",
        uri=f"https://dl.test?name={component}&version={version}",
        meta={"flynn.component": component},
        manifest=manifest.document(),
        hashes={"sha512_256": manifest.id()},
        size=len(manifest.canonical()),
        layer_url_template="https://dl.test?target=/layers/{id}.squashfs",
    )


NEW = {name: image(name, 2) for name in COMPONENTS}


class Cluster:
    """The way to the one controller there is."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.told: list[tuple[str, str]] = []
        self.forgotten = 0

    async def controller(self) -> Controller:
        return self._controller

    def forget_controller(self) -> None:
        self.forgotten += 1

    def renewal(self, images: dict[str, Artifact]) -> Renewal:
        def tell(app: str, facts: dict[str, Any]) -> None:
            self.told.append((app, facts["done"]))

        return Renewal(self, images, tell)


async def installed(controller: Controller, name: str, base: Artifact, *more: str, system: bool, **env: str) -> App:
    app = await controller.create_app(App(name=name, meta={SYSTEM_APP: "true"} if system else {}))
    release = await controller.create_release(
        Release(
            id=str(uuid.uuid4()), app_id=app.id, artifacts=[base.id, *more], env=env,
            processes={"web": ProcessType(args=["web"])},
        )
    )  # fmt: skip
    await controller.set_app_release(app.id, release.id)
    await controller.put_formation(Formation(app=app.id, release=release.id, processes={"web": 1}))
    return app


@pytest.fixture
async def cluster(controller: Controller) -> Cluster:
    old = {name: await controller.create_artifact(image(name, 1)) for name in COMPONENTS}
    slug = await controller.create_artifact(image("", 7))
    images = {
        "SLUGBUILDER_18_IMAGE_ID": old["slugbuilder"].id,
        "SLUGRUNNER_18_IMAGE_ID": old["slugrunner"].id,
    }
    await installed(controller, "shop", old["slugrunner"], slug.id, system=False, COLOUR="red")
    await installed(controller, "docker", slug, system=False)
    await installed(controller, "gitreceive", old["gitreceive"], system=True, **images)
    await installed(controller, "router", old["router"], system=True)
    return Cluster(controller)


async def test_apps_get_their_images_in_order_and_once(
    conninfo: str, controller: Controller, cluster: Cluster, scheduler: Scheduler
) -> None:
    before = {app.name: app.release for app in await controller.apps()}
    async with working(conninfo):
        await cluster.renewal(NEW).run()
        assert cluster.told == [
            ("router", "finished deploy of system app"),
            ("gitreceive", "finished deploy of system app"),
            ("shop", "finished deploy of app"),
        ]
        ids = {artifact.uri: artifact.id for artifact in await controller.artifacts()}
        router, shop = await controller.app_release("router"), await controller.app_release("shop")
        assert router.artifacts == [ids[NEW["router"].uri]]
        old = await controller.release(before["shop"])
        assert shop.artifacts == [ids[NEW["slugrunner"].uri], old.artifacts[1]] and shop.env == {"COLOUR": "red"}
        gitreceive = (await controller.app_release("gitreceive")).env
        assert gitreceive["SLUGRUNNER_18_IMAGE_ID"] == ids[NEW["slugrunner"].uri]
        assert gitreceive["SLUGBUILDER_18_IMAGE_ID"] == ids[NEW["slugbuilder"].uri]
        assert (await controller.app("docker")).release == before["docker"]

        cluster.told.clear()
        await cluster.renewal(NEW).run()
        assert cluster.told == []
        assert len(await controller.artifacts()) == len(ids)


async def test_a_deployment_that_fails_ends_it_and_a_second_run_goes_on(
    conninfo: str, controller: Controller, cluster: Cluster, scheduler: Scheduler
) -> None:
    before = {app.name: app.release for app in await controller.apps()}
    wanted = {app.name: app.id for app in await controller.apps()}
    scheduler.works = lambda request: request.app != wanted["gitreceive"] or request.release == before["gitreceive"]
    async with working(conninfo):
        with pytest.raises(BootstrapError, match="deploying gitreceive failed, it has its release back: "):
            await cluster.renewal(NEW).run()
        assert cluster.told == [("router", "finished deploy of system app")]
        for name in ("gitreceive", "shop"):
            assert (await controller.app(name)).release == before[name]

        scheduler.works = lambda request: True
        await cluster.renewal(NEW).run()
        assert [app for app, _ in cluster.told] == ["router", "gitreceive", "shop"]
