"""What a build becomes: stack, limits, artifact and release. Pure. spec/build-pipeline.md sections 3.3 to 3.5."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flynn.types.app import App
from flynn.types.artifact import (
    DEFAULT_ENTRYPOINT,
    SQUASHFS_TYPE,
    Artifact,
    Entrypoint,
    ImageManifest,
    Layer,
    Platform,
    Rootfs,
)
from flynn.types.codec import Wire, replace
from flynn.types.release import HealthCheck, Port, ProcessType, Release, Service
from flynn.types.resources import Limit, Resources, with_defaults

SLUG_UID = 5000
WEB_PORT = 8080
BUILDER_TYPE = "slugbuilder"  # not a process type that runs: it carries the limits of the next build
TYPE_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
MAX_TYPES = 100

BLOBS = "https://blobstore.discoverd:80"
LAYER_TEMPLATE = f"{BLOBS}/slugs/layers/{{id}}.squashfs"


class CannotBuild(Exception):
    """The push cannot become a release; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Stack:
    name: str  # also STACK of the build and `slugrunner.stack` of the release
    cf_name: str  # CF_STACK
    builder: str  # artifact ids
    runner: str
    warnings: tuple[str, ...] = ()


_DEPRECATED = (
    "WARNING: The cedar-14 stack is deprecated and does not receive security updates.",
    "WARNING: Unset FLYNN_STACK to use the default stack.",
)
_STACKS = (("heroku-18", "18", "cflinuxfs3", ()), ("cedar-14", "14", "cflinuxfs2", _DEPRECATED))


def choose_stack(wanted: str, environ: Mapping[str, str]) -> Stack:
    """Return the stack an app asks for (empty: the default one). Raises CannotBuild if this cluster has none such."""
    for name, number, cf_name, warnings in _STACKS:
        builder = environ.get(f"SLUGBUILDER_{number}_IMAGE_ID", "")
        runner = environ.get(f"SLUGRUNNER_{number}_IMAGE_ID", "")
        if name == (wanted or "heroku-18") and builder and runner:
            return Stack(name, cf_name, builder, runner, warnings)
    raise CannotBuild(f'Unknown FLYNN_STACK: "{wanted}"' if wanted else "this cluster has no slugbuilder image")


class Built(Wire):
    """What the build job wrote down about its slug. Nobody vouches for it."""

    sha512_256: str
    length: int
    process_types: dict[str, str] = {}
    detected: str = ""

    def types(self) -> list[str]:
        """Return the process types, sorted. Raises CannotBuild for names that are none."""
        for name in self.process_types:
            if not TYPE_NAME.fullmatch(name):
                raise CannotBuild(f"not the name of a process type: {name[:80]!r}")
        if len(self.process_types) > MAX_TYPES:
            raise CannotBuild(f"{len(self.process_types)} process types, at most {MAX_TYPES} are allowed")
        return sorted(self.process_types)


def slug_manifest(layer_hash: str, length: int) -> ImageManifest:
    """Return the image of a slug: one layer that is `/app`, run by the slugrunner below it."""
    layer = Layer(id=layer_hash, type=SQUASHFS_TYPE, length=length, hashes={"sha512_256": layer_hash})
    entrypoint = Entrypoint(
        args=["/runner/init", "bash"],
        cwd="/app",
        uid=SLUG_UID,
        gid=SLUG_UID,
        env={
            "HOME": "/app",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": "xterm",
        },
    )
    return ImageManifest(
        entrypoints={DEFAULT_ENTRYPOINT: entrypoint},
        rootfs=[Rootfs(platform=Platform(architecture="amd64", os="linux"), layers=[layer])],
    )


def slug_artifact(artifact_id: str, manifest: ImageManifest, types: Iterable[str]) -> Artifact:
    """Return the artifact of a slug."""
    manifest_id = manifest.id()
    return Artifact(
        id=artifact_id,
        type="flynn",
        uri=f"{BLOBS}/slugs/images/{manifest_id}.json",
        manifest=manifest.document(),
        hashes={"sha512_256": manifest_id},
        size=len(manifest.canonical()),
        layer_url_template=LAYER_TEMPLATE,
        meta={"blobstore": "true", "slugbuilder.process_types": ",".join(types)},
    )


def next_release(
    app: App,
    previous: Release | None,
    *,
    artifacts: list[str],
    types: Iterable[str],
    env: Mapping[str, str],
    meta: Mapping[str, str],
    stack: Stack,
) -> Release:
    """Return the release that follows `previous`: what was set by hand stays, what the Procfile says comes new."""
    old = previous.processes if previous else {}
    processes = {name: _process(app, name, old.get(name, ProcessType())) for name in types}
    if BUILDER_TYPE in old:
        processes[BUILDER_TYPE] = old[BUILDER_TYPE]
    return Release(
        app_id=app.id,
        artifacts=artifacts,
        env=overlaid_env(previous, env),
        meta={**(previous.meta if previous else {}), **meta, "slugrunner.stack": stack.name},
        processes=processes,
    )


def overlaid_env(previous: Release | None, env: Mapping[str, str]) -> dict[str, str]:
    """Return the app's configuration with what this push adds."""
    return {**(previous.env if previous else {}), **env}


def _process(app: App, name: str, old: ProcessType) -> ProcessType:
    process = replace(old, args=["/runner/init", "start", name], entrypoint=[], cmd=[])
    if (name == "web" or name.endswith("-web")) and not process.service:
        service = f"{app.name}-{name}"
        port = Port(
            port=WEB_PORT, proto="tcp", service=Service(name=service, create=True, check=HealthCheck(type="tcp"))
        )
        process = replace(process, service=service, ports=[port])
    return process


def build_resources(previous: Release | None, default_memory: str) -> Resources:
    """Return the limits of the build job: `flynn limit set slugbuilder ...`, else the operator's default memory."""
    if previous is not None and (builder := previous.processes.get(BUILDER_TYPE)) is not None and builder.resources:
        return with_defaults(builder.resources)
    memory = parse_bytes(default_memory)
    return with_defaults({"memory": Limit(request=memory, limit=memory)} if memory else None)


def parse_bytes(text: str) -> int | None:
    """`2GB`, `512M`, `1024`: binary units. None for what cannot be read."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)i?[bB]?\s*", text, re.ASCII)
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) or None


def parse_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """`KEY=value` arguments. Raises CannotBuild."""
    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CannotBuild(f'invalid var format: "{pair}"')
        parsed[name] = value
    return parsed
