"""The platform's apps and those on its slugrunner get the images of a release, one app after another.

Runs on a node, like bootstrap. The first deployment that fails ends it (the app has its old release back then); running
it again skips what is done.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flynn.aio.backoff import Backoff, attempts
from flynn.bootstrap.cluster import EVERY, BootstrapError, Cluster
from flynn.bootstrap.main import load_images
from flynn.bootstrap.record import Record
from flynn.bootstrap.renewal import image_of, in_order, renewed
from flynn.controller.client import Controller
from flynn.host.client import HostClient
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import replace
from flynn.types.deployment import Deployment
from flynn.types.errors import ApiError, ObjectExists
from flynn.types.host import META_APP_NAME

T = TypeVar("T")

STATUS_URL = "https://status-web.discoverd:80/"
HEALTHY_WITHIN = timedelta(seconds=90)  # the hosts have just been updated; nothing ought to be unwell for longer
DEPLOYED_WITHIN = timedelta(minutes=30)
ANSWERS_WITHIN = timedelta(minutes=2)  # the controller, which is deployed as well
LOOK = Backoff(first=timedelta(seconds=0.5), factor=1.2, limit=timedelta(seconds=3), jitter=0)

Tell = Callable[[str, dict[str, Any]], None]


async def update_apps(state_dir: Path, config_dir: Path, images: Path, tell: Tell) -> str:
    """Deploy what has other images than those in the file `images`; returns why it ended early, or "" at its end."""
    key_file = config_dir / "host.key"
    try:
        wanted = load_images(images)
        local_key = key_file.read_text().strip()
        cluster = Cluster(Identity.load(state_dir / "identity"), local_key)
    except (OSError, ApiError) as error:
        return str(error)
    try:
        cluster.controller_key = await _controller_key(local_key, state_dir)
        await _healthy(cluster)
        await Renewal(cluster, wanted, tell).run()
    except (BootstrapError, ApiError, TimeoutError, OSError) as error:
        return str(error) or type(error).__name__
    finally:
        await cluster.close()
    return ""


async def _controller_key(local_key: str, state_dir: Path) -> str:
    """The key of the controller: that of the operator's environment, of a controller here, or of the bootstrap."""
    if key := os.environ.get("CONTROLLER_KEY"):
        return key
    async with HttpClient("http://127.0.0.1:1113", auth=KeyAuth(local_key)) as http:
        for job in (await HostClient(http).jobs(active=True)).values():
            if job.job.metadata.get(META_APP_NAME) == "controller" and (key := job.job.config.env.get("AUTH_KEY", "")):
                return key.partition(",")[0]
    record = Record(state_dir / "bootstrap.json")
    if record.done("controller-key"):
        return str(record.steps["controller-key"].data.get("data", ""))
    raise BootstrapError("no controller runs on this host: set CONTROLLER_KEY, or update from a host that has one")


async def _healthy(cluster: Cluster) -> None:
    last = ""
    async for _ in attempts(EVERY, HEALTHY_WITHIN):
        http, path = await cluster.client_of(STATUS_URL, HEALTHY_WITHIN)
        async with http:
            try:
                await http.call("GET", path, timeout=10.0)
                return
            except ApiError as error:
                last = error.message
    raise BootstrapError(f"cluster is unhealthy: {last[:500]}")


class Controllers(Protocol):
    """The way to the controller, whichever instance answers."""

    async def controller(self) -> Controller: ...
    def forget_controller(self) -> None: ...


class Renewal:
    """One run over all apps."""

    def __init__(self, cluster: Controllers, images: Mapping[str, Artifact], tell: Tell) -> None:
        self._cluster, self._wanted, self._tell = cluster, images, tell
        self._images: dict[str, Artifact] = {}

    async def run(self) -> None:
        """Raises `BootstrapError`, or `ApiError` when the controller refuses."""
        self._images = await self._recorded()
        for app in in_order(await self._asked(lambda controller: controller.apps())):
            await self._renew(app)

    async def _recorded(self) -> dict[str, Artifact]:
        """The images as artifacts of the controller; those of an interrupted run are used again."""
        known = await self._asked(lambda controller: controller.artifacts())
        by_content = {(image_of(artifact), artifact.uri): artifact for artifact in known}
        found: dict[str, Artifact] = {}
        for name, image in self._wanted.items():
            recorded = by_content.get((image_of(image), image.uri))
            found[name] = recorded or await self._record(image)
        return found

    async def _record(self, image: Artifact) -> Artifact:
        return await self._asked(lambda controller: controller.create_artifact(image))

    async def _renew(self, app: App) -> None:
        if not app.release:
            return
        release = await self._asked(lambda controller: controller.app_release(app.id))
        if not release.artifacts:
            return
        base = await self._asked(lambda controller: controller.artifact(release.artifacts[0]))
        wanted = renewed(release, base, self._images, system=app.system)
        if wanted is None:
            return
        # With an id of ours, asking again after a lost answer makes no second one.
        new = replace(wanted, id=str(uuid.uuid4()))
        with contextlib.suppress(ObjectExists):
            await self._asked(lambda controller: controller.create_release(new))
        done = await self._finished(app, await self._begun(app, new.id))
        if done.error or done.status == "failed":
            raise BootstrapError(f"deploying {app.name} failed, it has its release back: {done.error}")
        kind = "system app" if app.system else "app"
        self._tell(app.name, {"done": f"finished deploy of {kind}", "release": new.id})

    async def _begun(self, app: App, release: str) -> Deployment:
        """Begin the deployment of a release, or find it if an earlier answer was lost."""
        try:
            return await self._asked(lambda controller: controller.create_deployment(app.id, release))
        except ApiError:
            for deployment in await self._asked(lambda controller: controller.deployments(app.id)):
                if deployment.new_release == release:
                    return deployment
            raise

    async def _finished(self, app: App, deployment: Deployment) -> Deployment:
        """Wait for the end. The controller may be the one that is deployed, so it is asked rather than followed."""
        async for _ in attempts(LOOK, DEPLOYED_WITHIN):
            if deployment.finished_at is not None or deployment.status in ("complete", "failed"):
                return deployment
            deployment = await self._asked(partial(_look, deployment.id))
        raise BootstrapError(f"the deployment of {app.name} is not done after {DEPLOYED_WITHIN}; it goes on")

    async def _asked(self, question: Callable[[Controller], Awaitable[T]]) -> T:
        """Ask the controller, whichever instance there is. Refusals that would be repeated are raised at once."""
        last: Exception | None = None
        async for _ in attempts(EVERY, ANSWERS_WITHIN):
            try:
                return await question(await self._cluster.controller())
            except (ApiError, BootstrapError, TimeoutError) as error:
                if isinstance(error, ApiError) and not error.retry and error.status < 500:
                    raise
                last = error
                self._cluster.forget_controller()
        assert last is not None
        raise last


async def _look(deployment: str, controller: Controller) -> Deployment:
    return await controller.deployment(deployment)
