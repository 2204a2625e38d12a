"""From app, release and images to what a host is asked to run. Pure.

Shared by everyone who starts jobs: the scheduler, the controller's one-off runs, the build pipeline and bootstrap.
The rules are those of spec/scheduler section 10 and spec/controller section 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flynn.types.app import HANDS_OVER, SYSTEM_APP, App, Strategy
from flynn.types.artifact import DEFAULT_ENTRYPOINT, SQUASHFS_TYPE, Artifact, Entrypoint
from flynn.types.codec import replace
from flynn.types.host import (
    META_APP,
    META_APP_NAME,
    META_FORMATION,
    META_RELEASE,
    META_SERVICE,
    META_TYPE,
    ContainerConfig,
    HostJob,
    Mountspec,
    VolumeBinding,
)
from flynn.types.job import NewJob
from flynn.types.release import ProcessType, Release
from flynn.types.resources import with_defaults

SYSTEM_PARTITION = "system"
PLATFORM_PREFIX = "flynn-controller."


def job_id(host_id: str, uuid: str) -> str:
    return f"{host_id}-{uuid}"


def split_job_id(cluster_id: str) -> tuple[str, str] | None:
    """Host id and uuid of a cluster-wide job id, or None if it is none."""
    host_id, dash, uuid = cluster_id.partition("-")
    return (host_id, uuid) if dash and host_id and uuid else None


def entrypoint(artifacts: Sequence[Artifact], process_type: str) -> Entrypoint:
    """The topmost image's entrypoint of that name, else the topmost default one, else an empty one."""
    images = [artifact.image() for artifact in reversed(artifacts) if artifact.type == "flynn"]
    for name in (process_type, DEFAULT_ENTRYPOINT):
        for image in images:
            if name and name in image.entrypoints:
                return image.entrypoints[name]
    return Entrypoint()


def mountspecs(artifacts: Sequence[Artifact]) -> list[Mountspec]:
    """The layers of all images, from the bottom up."""
    return [
        Mountspec(
            type="squashfs",
            id=layer.id,
            url=artifact.layer_url(layer),
            size=layer.length,
            hashes=layer.hashes,
            meta=artifact.meta,
        )
        for artifact in artifacts
        if artifact.type == "flynn"
        for layer in artifact.image().layers()
        if layer.type == SQUASHFS_TYPE
    ]


def formation_job(
    app: App,
    release: Release,
    artifacts: Sequence[Artifact],
    process_type: str,
    *,
    host_id: str,
    uuid: str,
    volumes: Sequence[VolumeBinding] = (),
) -> HostJob:
    """A job of a formation. Ports, DISCOVERD and addresses are added to its environment by the host."""
    process = release.processes[process_type]
    image = entrypoint(artifacts, process_type)
    identifier = job_id(host_id, uuid)
    metadata = {
        **app.meta,
        META_APP: app.id,
        META_APP_NAME: app.name,
        META_RELEASE: release.id,
        META_TYPE: process_type,
        META_FORMATION: "true",
    }
    if process.service:
        metadata[META_SERVICE] = process.service
    if app.strategy == Strategy.DISCOVERD_META:
        metadata[HANDS_OVER] = "true"
    return HostJob(
        id=identifier,
        metadata=metadata,
        mountspecs=mountspecs(artifacts),
        resources=process.resources,
        profiles=process.profiles,
        resurrect=process.resurrect,
        partition=SYSTEM_PARTITION if app.system else "",
        config=ContainerConfig(
            args=arguments(process, image),
            env={
                **image.env,
                **release.env,
                **process.env,
                "FLYNN_APP_ID": app.id,
                "FLYNN_APP_NAME": app.name,
                "FLYNN_RELEASE_ID": release.id,
                "FLYNN_PROCESS_TYPE": process_type,
                "FLYNN_JOB_ID": identifier,
            },
            working_dir=image.cwd,
            uid=image.uid,
            gid=image.gid,
            host_network=process.host_network,
            host_pid_namespace=process.host_pid_namespace,
            mounts=process.mounts,
            writeable_cgroups=process.writeable_cgroups,
            linux_capabilities=process.linux_capabilities or None,
            allowed_devices=process.allowed_devices or None,
            ports=process.ports,
            volumes=list(volumes),
        ),
    )


def arguments(process: ProcessType, image: Entrypoint) -> list[str]:
    return process.args or image.args or [*process.entrypoint, *process.cmd]


def one_off_job(
    app: App,
    release: Release,
    artifacts: Sequence[Artifact],
    wanted: NewJob,
    *,
    host_id: str,
    uuid: str,
    attached: bool,
    volumes: Sequence[VolumeBinding] = (),
) -> HostJob:
    """A job that somebody asked for once. Its metadata cannot pretend to be the platform's."""
    image = entrypoint(artifacts, "")
    identifier = job_id(host_id, uuid)
    mounts_from = release.processes.get(wanted.mounts_from) if wanted.mounts_from else None
    metadata = {
        key: value for key, value in wanted.meta.items() if not key.startswith(PLATFORM_PREFIX) and key != SYSTEM_APP
    }
    if app.system:
        # A one-off run of a system app belongs to the platform as its other jobs do.
        metadata[SYSTEM_APP] = "true"
    return HostJob(
        id=identifier,
        metadata={**metadata, META_APP: app.id, META_APP_NAME: app.name, META_RELEASE: release.id},
        mountspecs=mountspecs(artifacts),
        resources=with_defaults(wanted.resources),
        profiles=wanted.profiles,
        partition=wanted.partition,
        config=ContainerConfig(
            args=wanted.args or image.args,
            env={
                "FLYNN_APP_ID": app.id,
                "FLYNN_RELEASE_ID": release.id,
                "FLYNN_PROCESS_TYPE": "",
                "FLYNN_JOB_ID": identifier,
                **image.env,
                **(release.env if wanted.release_env else {}),
                **wanted.env,
            },
            stdin=attached,
            tty=wanted.tty,
            disable_log=wanted.disable_log,
            working_dir=image.cwd,
            uid=image.uid,
            gid=image.gid,
            mounts=mounts_from.mounts if mounts_from else [],
            volumes=list(volumes),
        ),
    )


def public_meta(metadata: Mapping[str, str]) -> dict[str, str]:
    """A job's metadata as the API shows it: without the platform's own keys."""
    return {key: value for key, value in metadata.items() if not key.startswith(PLATFORM_PREFIX)}


def with_legacy_defaults(process: ProcessType) -> ProcessType:
    """What a release's process type becomes when it is stored: old spellings translated, limits filled in."""
    args = [*(process.entrypoint or process.args), *process.cmd] if process.entrypoint or process.cmd else process.args
    return replace(process, args=args, resources=with_defaults(process.resources))
