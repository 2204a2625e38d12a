"""Which apps get new images in an update, in which order, and what their new releases are. Pure.

An app is renewed if its first artifact is an image of the platform: one whose `flynn.component` the release has, too.
Apps deployed from a Docker image are nobody's but their owner's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import replace
from flynn.types.release import Release

COMPONENT = "flynn.component"
RUNNER = "slugrunner"  # the image below apps that were pushed with git

#: The platform's own, in this order: who others need first; the controller deploys itself as it deploys the others.
ORDER = (
    "discoverd", "flannel", "blobstore", "taffy", "router", "gitreceive", "tarreceive", "controller", "logaggregator",
    "postgres", "status", "dashboard", "mariadb", "mongodb", "redis",
)  # fmt: skip

#: Variables that name images by the id of their artifact.
IMAGE_VARIABLES = {
    "SLUGBUILDER_18_IMAGE_ID": "slugbuilder",
    "SLUGRUNNER_18_IMAGE_ID": RUNNER,
    "REDIS_IMAGE_ID": "redis",
}


def in_order(apps: Iterable[App]) -> list[App]:
    """Return the platform's apps in their order, other system apps after them, users' apps last."""

    def place(app: App) -> tuple[int, str]:
        if not app.system:
            return len(ORDER) + 1, app.name
        return (ORDER.index(app.name) if app.name in ORDER else len(ORDER)), app.name

    return sorted(apps, key=place)


def image_of(artifact: Artifact) -> str:
    """Return what identifies an image's content."""
    return artifact.hashes.get("sha512_256", "")


def renewed(release: Release, base: Artifact, images: Mapping[str, Artifact], *, system: bool) -> Release | None:
    """Return what is to replace an app's release, or None if nothing is to be done.

    `base` is the release's first artifact, `images` are those of the update, recorded, so with their ids.
    """
    component = base.meta.get(COMPONENT, "")
    if component not in images or not (system or component == RUNNER):
        return None
    env = dict(release.env)
    for name, image in IMAGE_VARIABLES.items():
        if system and name in env and image in images:
            env[name] = images[image].id
    same = image_of(base) == image_of(images[component])
    if same and env == release.env:
        return None
    artifacts = release.artifacts if same else [images[component].id, *release.artifacts[1:]]
    return replace(release, id="", artifacts=artifacts, artifact="", env=env, created_at=None)
