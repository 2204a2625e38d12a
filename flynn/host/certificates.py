"""Certificates of the system jobs on this host: issued before a job starts, renewed while it runs.

User jobs get none. The files lie in the job's own directory, which is bound into the container, so that a renewed
certificate is seen there at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from flynn.aio.clock import Clock
from flynn.host import steps
from flynn.host.jobs.environment import is_system_app
from flynn.identity.authority import ClusterCA, expiry_of, write_private
from flynn.types.host import META_APP_NAME, META_SERVICE, META_TYPE, HostJob

log = logging.getLogger(__name__)

CHECK_EVERY = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Holder:
    """A job that holds a certificate, and what is in it."""

    job: HostJob
    addresses: tuple[str, ...]
    directory: Path


class JobCertificates:
    """Issues for one host. `authority` holds the cluster's CA key; `admin_key` is shared with discoverd alone."""

    def __init__(self, authority: ClusterCA, clock: Clock, admin_key: bytes = b"") -> None:
        self._authority, self._clock, self._admin_key = authority, clock, admin_key
        self._holders: dict[str, Holder] = {}

    async def issue(self, job: HostJob, addresses: Iterable[str], directory: Path) -> bool:
        """Put a fresh certificate into `directory` if the job is entitled to one; tells whether it is."""
        if not is_system_app(job):
            return False
        holder = Holder(job, tuple(addresses), directory)
        await asyncio.to_thread(self._write, holder)
        steps.reach("identity")
        self._holders[job.id] = holder
        return True

    def adopt(self, job: HostJob, addresses: Iterable[str], directory: Path) -> None:
        """Take over the renewal for a job of an earlier daemon."""
        if is_system_app(job):
            self._holders[job.id] = Holder(job, tuple(addresses), directory)

    def forget(self, job_id: str) -> None:
        """Stop renewing."""
        self._holders.pop(job_id, None)

    async def renew(self) -> None:
        """Renew what is due, for ever."""
        while True:
            for holder in list(self._holders.values()):
                try:
                    if await asyncio.to_thread(self._due, holder):
                        await asyncio.to_thread(self._write, holder)
                        log.info("certificate renewed", extra={"job": holder.job.id})
                except OSError as error:
                    log.error("certificate not renewed", extra={"job": holder.job.id, "error": str(error)})
            await self._clock.sleep(CHECK_EVERY)

    def _due(self, holder: Holder) -> bool:
        try:
            begin, end = expiry_of((holder.directory / "cert.pem").read_bytes())
        except (FileNotFoundError, ValueError):
            return True
        return renewal_due(begin, end, self._clock.now())

    def _write(self, holder: Holder) -> None:
        job = holder.job
        app, process = job.metadata.get(META_APP_NAME, ""), job.metadata.get(META_TYPE, "")
        service = job.metadata.get(META_SERVICE, "")
        credentials = self._authority.issue_job(app or job.id, process, service, holder.addresses)
        uid = job.config.uid if job.config.uid is not None else -1
        gid = job.config.gid if job.config.gid is not None else -1
        credentials.write(holder.directory, uid=uid, gid=gid)
        if app == "discoverd" and self._admin_key:
            # Its listener on loopback takes the same key as the host's own.
            write_private(holder.directory / "host.key", self._admin_key)


def renewal_due(begin: datetime, end: datetime, now: datetime) -> bool:
    """A certificate is renewed after two thirds of its life: a host may be down for a while without harm."""
    return now >= begin + (end - begin) * 2 / 3
