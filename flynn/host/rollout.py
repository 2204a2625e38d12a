"""An update of all hosts of a cluster: first everything is brought to every host, then one after another is updated.

Nothing has changed as long as something is missing somewhere. The first host that does not come up with the new version
ends it; the hosts after it stay as they are, and running it again goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flynn.aio.backoff import Backoff, attempts
from flynn.host.client import HostClient
from flynn.types.errors import ApiError
from flynn.types.host import ActiveJob, HostCommand, HostStatus, JobStatus

EVERY = Backoff(first=timedelta(milliseconds=200), factor=1.3, limit=timedelta(seconds=1), jitter=0)
REPLACED_WITHIN = timedelta(seconds=150)  # a start may take 90 s, and then the one before has to start again

PROGRAM = "flynn-host"


class RolloutFailed(Exception):
    """A host could not be updated; the message says which, and why."""


@dataclass(frozen=True, slots=True)
class Member:
    """A host of the cluster."""

    id: str
    client: HostClient


Tell = Callable[[str, str, dict[str, Any]], None]
"""Told of each step: host, step (images, program, daemon, already), and what there is to say."""


class Rollout:
    """Brings `version` from `repository` onto hosts."""

    def __init__(self, hosts: Sequence[Member], repository: str, version: str, tell: Tell) -> None:
        self._hosts, self._repository, self._version, self._tell = hosts, repository, version, tell
        self.programs: dict[str, str] = {}  # by host: the path of the new flynn-host there

    async def run(self) -> None:
        """Raises `RolloutFailed`."""
        for host in self._hosts:
            await self._named(host, self._bring(host))
        for host in self._hosts:
            await self._named(host, self._update(host))

    async def _named(self, host: Member, work: Any) -> None:
        try:
            await work
        except ApiError as error:
            raise RolloutFailed(f"{host.id}: {error.message}") from error

    async def _bring(self, host: Member) -> None:
        fetched = 0
        async for pulled in host.client.pull_images(self._repository, self._version):
            fetched += pulled.type == "layer"
        self._tell(host.id, "images", {"layers": fetched})
        paths = await host.client.pull_program(self._repository, self._version)
        self.programs[host.id] = paths[PROGRAM]
        self._tell(host.id, "program", {"path": paths[PROGRAM]})

    async def _update(self, host: Member) -> None:
        before = await host.client.status()
        if before.version == self._version:
            self._tell(host.id, "already", {"version": before.version})
            return
        running = await self._running(host)
        await host.client.update(HostCommand(path=self.programs[host.id]))
        after = await self._replaced(host, before)
        if after.version != self._version:
            raise RolloutFailed(f"{host.id}: serves {after.version} instead of {self._version}")
        for job in running:
            now = await host.client.job(job.job.id)
            if now.status is JobStatus.FAILED:
                raise RolloutFailed(f"{host.id}: job {job.job.id} was lost: {now.error}")
        self._tell(host.id, "daemon", {"version": after.version, "was": before.version, "jobs": len(running)})

    async def _running(self, host: Member) -> list[ActiveJob]:
        jobs = await host.client.jobs(active=True)
        return [job for job in jobs.values() if job.status is JobStatus.RUNNING]

    async def _replaced(self, host: Member, before: HostStatus) -> HostStatus:
        """Wait until one program or the other serves."""
        async for _ in attempts(EVERY, REPLACED_WITHIN):
            try:
                after = await host.client.status()
            except ApiError:
                continue
            if after.update is None or after.update == before.update:
                continue
            if after.update.error:
                raise RolloutFailed(f"{host.id}: the new program gave way to the one before: {after.update.error}")
            return after
        raise RolloutFailed(f"{host.id}: does not answer since its update; see its journal")
