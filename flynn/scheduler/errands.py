"""What hosts are asked to do: start a job with its volumes, and end one without losing a request."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from flynn.scheduler import wire
from flynn.scheduler.events import Overruled, StartDone, StartJob, StopDone, StopJob
from flynn.scheduler.host_links import QUICK, HostLinks
from flynn.scheduler.model import JobID, VolumeState
from flynn.scheduler.neighbours import HostApi, Tell
from flynn.types.errors import ApiError, Conflict, NotFound, PreconditionFailed
from flynn.types.host import HostJob

log = logging.getLogger(__name__)

DRAIN_LIMIT = timedelta(seconds=10)
UNROUTED_DRAIN = timedelta(seconds=1)  # for routers to see a job leave its service when none of them reports backends


class Errands:
    def __init__(self, hosts: HostLinks, tell: Tell) -> None:
        self._hosts = hosts
        self._tell = tell
        self._drained: dict[JobID, asyncio.Event] = {}

    def drained(self, job: JobID) -> None:
        """No router has the job any more: who waits to stop it may go on."""
        if job in self._drained:
            self._drained[job].set()

    async def start(self, action: StartJob) -> None:
        job, error, created = action.job, "", []
        assert job.host is not None
        try:
            api = self._hosts.api(job.host)
            asked = wire.host_job(job, action.formation, action.volumes)
            async with asyncio.timeout(QUICK.total_seconds()):
                for volume in action.volumes:
                    if volume.state is VolumeState.PENDING:
                        await api.create_volume(wire.volume_request(volume))
                        created.append(volume.id)
                await _add_job(api, asked)
        except PreconditionFailed as failure:
            error = str(failure)
            await self._tell(Overruled())
        except (ApiError, TimeoutError) as failure:
            error = str(failure) or "timed out"
        except KeyError:
            error = f"release {job.release} has no process type {job.type}"
        await self._tell(StartDone(job.id, job.host, tuple(created), error))

    async def stop(self, action: StopJob) -> None:
        """Out of service, drained, stopped. A step that fails does not keep the next one from being tried."""
        cluster_id = f"{action.host}-{action.job}"
        try:
            api = self._hosts.api(action.host)
            if action.serves:
                await self._take_out_of_service(api, action, cluster_id)
            await api.stop_job(cluster_id)
        except PreconditionFailed:
            await self._tell(Overruled())
        except ApiError as error:
            # The next listing of the host tells whether there is still something to stop.
            log.info("stop failed", extra={"job": cluster_id, "error": error})
        await self._tell(StopDone(action.job, action.host))

    async def _take_out_of_service(self, api: HostApi, action: StopJob, cluster_id: str) -> None:
        drained = self._drained[action.job] = asyncio.Event()
        try:
            async with asyncio.timeout(QUICK.total_seconds()):
                await api.deregister_job(cluster_id)
            limit = DRAIN_LIMIT if action.carried else UNROUTED_DRAIN
            async with asyncio.timeout(limit.total_seconds()):
                await drained.wait()
        except TimeoutError:
            pass
        except PreconditionFailed:
            raise
        except ApiError as error:
            log.info("job cannot be deregistered", extra={"job": cluster_id, "error": error})
        finally:
            self._drained.pop(action.job, None)


async def _add_job(api: HostApi, job: HostJob) -> None:
    try:
        await api.add_job(job)
    except Conflict:
        # An earlier request whose answer was lost has succeeded, or a volume is in use.
        try:
            await api.job(job.id)
        except NotFound:
            pass
        else:
            return
        raise
