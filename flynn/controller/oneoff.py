"""Running a job once, outside any formation: started here, recorded later by the scheduler from the host's events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from flynn import jobspec
from flynn.aio.backoff import Backoff, retrying
from flynn.controller import validation
from flynn.controller.hosts import Hosts
from flynn.controller.ids import given, new_id
from flynn.controller.stores import Stores
from flynn.host.attach import AttachRefused, ProtocolViolation
from flynn.host.client import HostClient
from flynn.http.connection import RawConnection
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.errors import ApiError, RateLimited, ServiceUnavailable, Unreachable, ValidationError
from flynn.types.host import META_APP, META_RELEASE, META_TYPE, AttachFlag, AttachReq, HostJob, VolumeBinding
from flynn.types.job import Job, NewJob
from flynn.types.release import Release
from flynn.types.volume import VolumeRequest

START_PATIENCE = timedelta(seconds=30)  # while the host says "later"
VOLUME_PATIENCE = timedelta(seconds=5)
EVERY = Backoff(first=timedelta(milliseconds=100), factor=1.5, limit=timedelta(seconds=1))
LATER = (RateLimited, ServiceUnavailable)
DATA_PATH = "/data"


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to run, all names resolved."""

    app: App
    release: Release
    artifacts: list[Artifact]
    wanted: NewJob
    uuid: str


class OneOffRuns:
    """Starts one-off jobs on hosts."""

    def __init__(self, stores: Stores, hosts: Hosts) -> None:
        self._stores = stores
        self._hosts = hosts

    async def plan(self, app_ref: str, wanted: NewJob) -> Planned:
        """Resolve and check what a client wants to run."""
        app = await self._stores.apps.get(app_ref)
        validation.required("release", wanted.release)
        if wanted.partition:
            validation.one_of("partition", wanted.partition, validation.PARTITIONS)
        validation.environment(wanted.env)
        release = await self._stores.releases.get(wanted.release)
        ids = [given("artifacts", artifact) for artifact in wanted.artifacts or release.artifacts]
        if not ids:
            raise ValidationError("release.ArtifactIDs", "cannot be empty")
        artifacts = await self._stores.artifacts.by_ids(ids)
        if len(artifacts) != len(ids):
            raise ValidationError("artifacts", "names an artifact that does not exist")
        return Planned(app, release, artifacts, wanted, new_id())

    async def run_detached(self, planned: Planned) -> Job:
        """Start a job and return as soon as its host has accepted it."""
        async with self._on_a_host() as (host_id, host):
            job = await self._construct(planned, host_id, host, attached=False)
            await _add(host, job)
        return Job(
            uuid=planned.uuid,
            id=job.id,
            host_id=host_id,
            release=planned.release.id,
            args=job.config.args,
        )

    @asynccontextmanager
    async def run_attached(self, planned: Planned) -> AsyncIterator[RawConnection]:
        """Start a job attached to its standard streams; the connection carries nothing but frames.

        Raises:
            ApiError: the job could not be started or attached to.
        """
        async with self._on_a_host() as (host_id, host):
            job = await self._construct(planned, host_id, host, attached=True)
            request = AttachReq(
                job_id=job.id,
                flags=AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.STDIN | AttachFlag.STREAM,
                height=planned.wanted.tty_lines,
                width=planned.wanted.tty_columns,
            )
            try:
                # Attached first, so that nothing the job says can be missed.
                async with host.attach(request) as attachment:
                    await _add(host, job)
                    await attachment.ready()
                    yield attachment.connection
            except (AttachRefused, ProtocolViolation) as error:
                raise ApiError(f"could not attach to the job: {error}") from error

    @asynccontextmanager
    async def _on_a_host(self) -> AsyncIterator[tuple[str, HostClient]]:
        host_id = await self._hosts.pick()
        try:
            async with self._hosts.open(host_id) as host:
                yield host_id, host
        except Unreachable as error:
            # Not to be repeated blindly: the job may have been accepted.
            raise ServiceUnavailable(f"host {host_id} cannot be reached: {error.message}", retry=False) from error

    async def _construct(self, planned: Planned, host_id: str, host: HostClient, *, attached: bool) -> HostJob:
        volumes = [await self._data_volume(planned, host)] if planned.wanted.data else []
        return jobspec.one_off_job(
            planned.app,
            planned.release,
            planned.artifacts,
            planned.wanted,
            host_id=host_id,
            uuid=planned.uuid,
            attached=attached,
            volumes=volumes,
        )

    async def _data_volume(self, planned: Planned, host: HostClient) -> VolumeBinding:
        wanted = VolumeRequest(
            id=new_id(),
            type="data",
            meta={
                META_APP: planned.app.id,
                META_RELEASE: planned.release.id,
                META_TYPE: "",
                "flynn-controller.path": DATA_PATH,
                "flynn-controller.delete_on_stop": "true",
            },
        )
        made = await retrying(lambda: host.create_volume(wanted), on=LATER, policy=EVERY, within=VOLUME_PATIENCE)
        return VolumeBinding(target=DATA_PATH, volume=made.id, writeable=True, delete_on_stop=True)


async def _add(host: HostClient, job: HostJob) -> None:
    await retrying(lambda: host.add_job(job), on=LATER, policy=EVERY, within=START_PATIENCE)
