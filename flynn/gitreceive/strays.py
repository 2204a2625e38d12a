"""Build jobs whose push is over: stopped by the next push of their app.

A push that is killed together with its gitreceive cannot stop its build job. Whoever takes its lease over can: builds
of the app that name another push than the one that holds the lease now are nobody's.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from flynn.discoverd.registry import Registry
from flynn.gitreceive.release import BUILDER_TYPE
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.host import META_APP, META_TYPE, HostJob
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

HOST_SERVICE = "flynn-host"
META_PUSH = "flynn-gitreceive.push"  # of a build job: the token of the lease under which it was started
LIMIT = timedelta(seconds=5)  # for all hosts together; one that is dead keeps no push waiting


def is_stray(job: HostJob, app_id: str, token: str) -> bool:
    """Whether the job builds the app for another push than the one with `token`. Builds started by hand name none."""
    meta = job.metadata
    return meta.get(META_APP) == app_id and meta.get(META_TYPE) == BUILDER_TYPE and meta.get(META_PUSH, token) != token


class Strays:
    def __init__(self, registry: Registry, identity: Identity) -> None:
        self._registry = registry
        self._identity = identity

    async def stop(self, app_id: str, token: str) -> None:
        """Stop builds of the app that belong to other pushes than the one with `token`, as far as hosts answer."""
        try:
            async with asyncio.timeout(LIMIT.total_seconds()):
                hosts = await self._registry.instances(HOST_SERVICE)
                async with asyncio.TaskGroup() as group:
                    for host in hosts:
                        group.create_task(self._stop_on(host, app_id, token), name=f"strays on {host.addr}")
        except (ApiError, TimeoutError) as error:
            log.warning("not all hosts could be asked for builds left behind", extra={"error": error})

    async def _stop_on(self, instance: Instance, app_id: str, token: str) -> None:
        url = f"https://{instance.addr}"
        try:
            async with HttpClient(url, tls=self._identity, server_name=f"{HOST_SERVICE}.discoverd") as http:
                host = HostClient(http)
                for active in (await host.jobs(active=True)).values():
                    if is_stray(active.job, app_id, token):
                        log.warning("stopping a build whose push is over", extra={"job": active.job.id})
                        await host.stop_job(active.job.id)
        except ApiError as error:
            log.warning("a host could not be asked for builds", extra={"host": instance.addr, "error": error})
