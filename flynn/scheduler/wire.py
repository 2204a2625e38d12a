"""Between the wire types of controller and hosts and the scheduler's own model. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from flynn import jobspec
from flynn.scheduler.engine import Engine
from flynn.scheduler.events import JobReport, RecordedJob
from flynn.scheduler.model import (
    WIRE_STATE,
    Formation,
    HostID,
    Job,
    JobID,
    Volume,
    VolumeID,
    VolumeState,
)
from flynn.types.codec import ZERO_TIME, builtins
from flynn.types.formation import ExpandedFormation
from flynn.types.host import (
    META_APP,
    META_FORMATION,
    META_RELEASE,
    META_TYPE,
    ActiveJob,
    HostJob,
    VolumeBinding,
)
from flynn.types.job import Job as WireJob
from flynn.types.volume import META_QUOTA, META_SNAPSHOT_OF, VolumeInfo, VolumeRequest
from flynn.types.volume import Volume as WireVolume

META_PATH = "flynn-controller.path"
META_DELETE_ON_STOP = "flynn-controller.delete_on_stop"

SHUTDOWN = "shutdown"  # metadata of a host that is going away; any value
TAG_PREFIX = "tag:"


def formation(given: ExpandedFormation) -> Formation | None:
    """None for the mark that says "caught up"."""
    if given.app is None or given.release is None:
        return None
    gone = given.deleted or given.processes is None
    return Formation(
        app=given.app,
        release=given.release,
        artifacts=tuple(given.artifacts),
        wanted={} if gone else dict(given.processes or {}),
        tags=dict(given.tags or {}),
        updated_at=_set(given.updated_at),
        scale_request=given.pending_scale_request,
    )


def report(host: HostID, active: ActiveJob) -> JobReport | None:
    """None for jobs that no app owns."""
    meta = active.job.metadata
    parts = jobspec.split_job_id(active.job.id)
    if parts is None or not meta.get(META_APP):
        return None
    return JobReport(
        host=host,
        id=JobID(parts[1]),
        app=meta[META_APP],
        release=meta.get(META_RELEASE, ""),  # the build of an app's first release has none
        type=meta.get(META_TYPE, ""),
        in_formation=meta.get(META_FORMATION) == "true",
        status=active.status,
        created_at=active.created_at,
        started_at=_set(active.started_at),
        ended_at=_set(active.ended_at),
        args=tuple(active.job.config.args),
        volumes=tuple(VolumeID(binding.volume) for binding in active.job.config.volumes),
        meta=jobspec.public_meta(meta),
        exit_status=active.exit_status,
        error=active.error,
        memory=asked.request or 0 if (asked := active.job.resources.get("memory")) is not None else 0,
        resurrected=active.status.down and active.job.resurrect and not active.force_stop,
    )


def record(job: WireJob) -> RecordedJob:
    return RecordedJob(
        id=JobID(job.uuid),
        app=job.app,
        release=job.release,
        type=job.type,
        state=job.state,
        host=HostID(job.host_id) if job.host_id else None,
        restarts=job.restarts or 0,
        run_at=job.run_at,
        args=tuple(job.args),
        changed_at=job.updated_at,
    )


def job(job: Job) -> WireJob:
    return WireJob(
        uuid=job.id,
        id=job.cluster_id,
        host_id=job.host or "",
        app=job.app,
        release=job.release,
        type=job.type,
        state=WIRE_STATE[job.state],
        args=list(job.args),
        volumes=[str(id) for id in job.volumes],
        meta=dict(job.meta),
        exit_status=job.exit_status,
        host_error=job.host_error,
        run_at=job.run_at,
        restarts=job.restarts or None,
        reason=job.reason,
    )


def host_job(job: Job, formation: Formation, volumes: tuple[Volume, ...]) -> HostJob:
    """What the host is asked to run. Raises KeyError if the release has no such process type."""
    assert job.host is not None
    return jobspec.formation_job(
        formation.app,
        formation.release,
        formation.artifacts,
        job.type,
        host_id=job.host,
        uuid=job.id,
        volumes=[
            VolumeBinding(target=volume.path, volume=volume.id, writeable=True, delete_on_stop=volume.delete_on_stop)
            for volume in volumes
        ],
    )


def volume_of_host(host: HostID, info: VolumeInfo) -> Volume | None:
    """None for volumes that no app owns, and for snapshots: nobody can write to them."""
    if META_APP not in info.meta or META_SNAPSHOT_OF in info.meta:
        return None
    return Volume(
        id=VolumeID(info.id),
        host=host,
        app=info.meta[META_APP],
        release=info.meta.get(META_RELEASE, ""),
        type=info.meta.get(META_TYPE, ""),
        path=info.meta.get(META_PATH, ""),
        delete_on_stop=info.meta.get(META_DELETE_ON_STOP) == "true",
        state=VolumeState.CREATED,
        created_at=_set(info.created_at),
    )


def recorded_volume(given: WireVolume) -> Volume | None:
    """None for volumes that no app owns, and for states that nobody knows."""
    if not given.app or given.state not in list(VolumeState):
        return None
    return Volume(
        id=VolumeID(given.id),
        host=HostID(given.host_id),
        app=given.app,
        release=given.release,
        type=given.job_type,
        path=given.path,
        delete_on_stop=given.delete_on_stop,
        state=VolumeState(given.state),
        decommissioned=given.decommissioned_at is not None and given.decommissioned_at != ZERO_TIME,
        created_at=given.created_at,
    )


def volume_meta(volume: Volume) -> dict[str, str]:
    return {
        META_APP: volume.app,
        META_RELEASE: volume.release,
        META_TYPE: volume.type,
        META_PATH: volume.path,
        META_DELETE_ON_STOP: "true" if volume.delete_on_stop else "false",
    }


def volume_request(volume: Volume) -> VolumeRequest:
    limit = {META_QUOTA: str(volume.size)} if volume.size else {}
    return VolumeRequest(id=volume.id, type="data", meta={**volume_meta(volume), **limit})


def volume(volume: Volume) -> WireVolume:
    return WireVolume(
        id=volume.id,
        host_id=volume.host,
        type="data",
        state=volume.state.value,
        path=volume.path,
        delete_on_stop=volume.delete_on_stop,
        app=volume.app,
        release=volume.release,
        job=volume.job,
        job_type=volume.type,
        meta=volume_meta(volume),
        created_at=volume.created_at,
    )


def debug_state(engine: Engine, job_id: str) -> dict[str, Any]:
    """The snapshot for `GET /debug/state`. No environment: it holds secrets."""
    world = engine.world
    state: dict[str, Any] = {"job_id": job_id}
    if engine.leader is not None:
        state["is_leader"] = engine.leader
    state["settled"] = engine.settled
    state["hosts"] = {
        host.id: {
            "id": host.id,
            "tags": dict(host.tags),
            "healthy": host.healthy,
            "checks": host.failed_checks,
            "shutdown": host.shutting_down,
            "memory": host.memory,
            "memory_requested": world.reserved.get(host.id, 0),
        }
        for host in world.hosts.values()
    }
    state["jobs"] = {job.id: _debug_job(job) for job in world.jobs.values()}
    state["formations"] = {
        str(key): {
            "app": {"id": formation.app.id, "name": formation.app.name, "meta": formation.app.meta},
            "release": {
                "id": formation.release.id,
                "processes": {
                    type: {
                        "args": process.args,
                        "omni": process.omni,
                        "service": process.service,
                        "volumes": builtins(process.volumes),
                    }
                    for type, process in formation.release.processes.items()
                },
            },
            "processes": formation.targets(world.hosts.values()),
            "original_processes": dict(formation.wanted),
            "tags": {type: dict(tags) for type, tags in formation.tags.items()},
            "updated_at": formation.updated_at,
        }
        for key, formation in world.formations.items()
    }
    state["volumes"] = {id: builtins(volume(held)) for id, held in world.volumes.items()}
    return state


def _debug_job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": job.type,
        "app_id": job.app,
        "release_id": job.release,
        "args": list(job.args),
        "host_id": job.host or "",
        "job_id": job.cluster_id,
        "volumes": list(job.volumes),
        "restarts": job.restarts,
        "run_at": job.run_at,
        "started_at": job.started_at,
        "state": job.state.value,
        "reason": job.reason,
    }


def _set(moment: datetime) -> datetime | None:
    return None if moment == ZERO_TIME else moment
