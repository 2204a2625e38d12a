"""The list of steps: reading a manifest, and choosing from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import Wire, convert, decode
from flynn.types.release import Release
from flynn.types.route import Route

IMAGE = "$image_artifact["


class ResourceSpec(Wire):
    """A resource that a step wants provisioned: a provider's name and address."""

    name: str
    url: str


class PortSpec(Wire):
    port: int
    proto: str = "tcp"


class Step(Wire):
    """One step. Which fields matter depends on the action; spec/bootstrap section 3 lists them."""

    id: str
    action: str
    vars: list[str] = []
    ports: list[PortSpec] = []
    app: App | None = None
    release: Release | None = None
    artifacts: list[Artifact] = []
    artifact: Artifact | None = None
    processes: dict[str, int] = {}
    resources: list[ResourceSpec] = []
    app_step: str = ""
    from_step: str = ""
    cert_step: str = ""
    length: int = 16
    data: str = ""
    encoding: str = "hex"
    controller_key: bool = False
    hosts: list[str] = []
    ca_cert: str = ""
    cert: str = ""
    key: str = ""
    url: str = ""
    host: str = ""
    status: int = 200
    timeout: int = 60  # seconds
    service: str = ""
    name: str = ""
    route: Route | None = None
    enabled: bool = False
    output: str = ""


class ManifestError(ValueError):
    """The manifest cannot be used; the message names the step."""


def shipped() -> bytes:
    """The manifest that comes with this version."""
    return files("flynn.bootstrap").joinpath("manifest.json").read_bytes()


def parse(raw: bytes, images: Mapping[str, Artifact], known_actions: Sequence[str]) -> list[Step]:
    """Read a manifest, putting the artifact of each image where `$image_artifact[name]` stands."""
    steps = [convert(_with_images(item, images), Step) for item in decode(raw, list[dict[str, Any]])]
    for step in steps:
        if step.action not in known_actions:
            raise ManifestError(f"bootstrap: unknown action {step.action!r}")
    names = [step.id for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"bootstrap: step {name!r} is there twice")
    return steps


def choose(steps: Sequence[Step], wanted: Sequence[str]) -> list[Step]:
    """The steps named in `wanted`, in the manifest's order; all of them when nothing is named."""
    unknown = set(wanted) - {step.id for step in steps}
    if unknown:
        raise ManifestError(f"bootstrap: unknown steps {', '.join(sorted(unknown))}")
    return [step for step in steps if not wanted or step.id in wanted]


def capped(processes: Mapping[str, int], *, singleton: bool) -> dict[str, int]:
    """On a cluster of one node nothing runs twice."""
    return {name: min(count, 1) if singleton else count for name, count in processes.items()}


def _with_images(value: Any, images: Mapping[str, Artifact]) -> Any:
    match value:
        case str() if value.startswith(IMAGE) and value.endswith("]"):
            name = value[len(IMAGE) : -1]
            if name not in images:
                raise ManifestError(f"bootstrap: there is no image {name!r}; has it been built?")
            return images[name]
        case list():
            return [_with_images(item, images) for item in value]
        case dict():
            return {key: _with_images(item, images) for key, item in value.items()}
    return value
