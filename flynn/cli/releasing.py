"""A changed release, stored and deployed: what `env`, `limit`, `resource` and `release` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flynn.controller.client import Controller
    from flynn.types.app import App
    from flynn.types.release import Release


async def current_release(controller: Controller, app: str) -> Release | None:
    """None for an app that has none yet."""
    from flynn.types.errors import NotFound

    try:
        return await controller.app_release(app)
    except NotFound:
        return None


async def release_or_empty(controller: Controller, app: App) -> Release:
    """The release to change: the app's own, or an empty one to begin with."""
    from flynn.types.release import Release

    return await current_release(controller, app.id) or Release()


async def deploy_changed(controller: Controller, app: App, changed: Release) -> Release:
    """Store `changed` as a new release of the app and deploy it; returns when it is in service.

    Raises:
        DeploymentFailed: naming the release that stays behind.
    """
    from flynn.controller.client import DeploymentFailed
    from flynn.types.codec import replace

    stored = await controller.create_release(replace(changed, id="", app_id=app.id, created_at=None, artifact=""))
    try:
        await controller.deploy(app.id, stored.id)
    except DeploymentFailed as error:
        raise DeploymentFailed(f"{error} (release {stored.id} was created but is not in service)") from error
    return stored
