"""Which hosts there are: seen, suspected, probed, given up. A daemon that restarts is not a machine that died."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timedelta

from flynn.scheduler import job_state
from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.events import CheckHost, FollowHost, HostDescribed, HostSeen, UnfollowHost
from flynn.scheduler.jobs import JobBook
from flynn.scheduler.model import Host, HostID

log = logging.getLogger(__name__)

FAILED_CHECKS = 3  # in a row, when discoverd has given the host up as well: then its jobs are replaced
FAILED_CHECKS_LISTED = 30  # while discoverd still lists it: its daemon may just be restarting, and its jobs run on
CHECK_EVERY = timedelta(milliseconds=500)
STEADY = timedelta(seconds=30)  # so long a host has to have been well before jobs are moved to it


class HostWatch:
    def __init__(self, desk: Desk, jobs: JobBook) -> None:
        self.unlisted: dict[HostID, None] = {}  # hosts whose jobs have not been listed yet
        self._desk = desk
        self._world = desk.world
        self._jobs = jobs
        self._checking: dict[HostID, datetime] = {}  # since when

    def seen(self, event: HostSeen, now: datetime) -> None:
        """discoverd lists the host."""
        known = self._world.hosts.get(event.host)
        if known is None:
            if event.shutting_down:
                return
            self._world.hosts[event.host] = Host(event.host, dict(event.tags), steady_since=now)
            self.unlisted[event.host] = None
            self._desk.ask(FollowHost(event.host))
            self._desk.arm(now + STEADY, Timer.STEADY)
            log.info("host up", extra={"host": event.host})
            self._changed()
            return
        host = replace(
            known,
            tags=dict(event.tags),
            shutting_down=event.shutting_down,
            healthy=True,
            failed_checks=0,
            listed=True,
            steady_since=known.steady_since if known.takes_jobs and not event.shutting_down else now,
        )
        self._world.hosts[event.host] = host
        if host.tags != known.tags:
            log.info("host tags changed", extra={"host": event.host, "from": known.tags, "to": host.tags})
        if host.tags != known.tags or host.shutting_down != known.shutting_down or not known.healthy:
            self._changed()
            self._desk.arm(now + STEADY, Timer.STEADY)

    def described(self, event: HostDescribed) -> None:
        host = self._world.hosts.get(event.host)
        if host is not None and host.memory != event.memory:
            self._world.hosts[host.id] = replace(host, memory=event.memory)
            self._desk.unblock()

    def gone(self, id: HostID, now: datetime) -> None:
        """discoverd does not list it any more."""
        host = self._world.hosts.get(id)
        if host is None:
            return
        if host.shutting_down:
            self._unfollow(host, now)
        else:
            self._world.hosts[id] = host = replace(host, listed=False)
            if not host.healthy and host.failed_checks >= FAILED_CHECKS:
                self._unfollow(host, now)  # its probes had failed before discoverd noticed
            else:
                self.suspect(id, now)

    def suspect(self, id: HostID, now: datetime) -> None:
        """Begin to probe a host; while it is under suspicion already, the probes go on at their own pace."""
        host = self._world.hosts.get(id)
        if host is None or not host.healthy:
            return
        self._world.hosts[id] = replace(host, healthy=False)
        self._check(id, now)

    def check_again(self, id: HostID, now: datetime) -> None:
        host = self._world.hosts.get(id)
        if host is not None and not host.healthy:
            self._check(id, now)

    def _check(self, id: HostID, now: datetime) -> None:
        if id not in self._checking:
            self._checking[id] = now
            self._desk.ask(CheckHost(id))

    def checked(self, id: HostID, alive: bool, now: datetime) -> None:
        """A probe has been answered, or has not."""
        asked_at = self._checking.pop(id, now)
        host = self._world.hosts.get(id)
        if host is None or host.healthy:
            return
        if alive:
            self._world.hosts[id] = replace(host, healthy=True, failed_checks=0, steady_since=now)
            self._desk.arm(now + STEADY, Timer.STEADY)
            self._changed()
            return
        failed = host.failed_checks + 1
        self._world.hosts[id] = replace(host, failed_checks=failed)
        if failed >= (FAILED_CHECKS_LISTED if host.listed else FAILED_CHECKS):
            self._unfollow(self._world.hosts[id], now)
        else:
            # A machine without power does not even refuse: its probes take their full time, and follow each other.
            self._desk.at(max(now, asked_at + CHECK_EVERY), Timer.CHECK, id)

    def _unfollow(self, host: Host, now: datetime) -> None:
        log.warning("host lost", extra={"host": host.id, "jobs": len(self._world.jobs_on(host.id))})
        del self._world.hosts[host.id]
        self.unlisted.pop(host.id, None)
        self._desk.ask(UnfollowHost(host.id))
        for job in self._world.jobs_on(host.id):
            self._jobs.apply(job, job_state.Lost("its host is gone", now), now)
        self._changed()

    def became_steady(self, now: datetime) -> None:
        """Some hosts have been well for long enough; others may still need their time."""
        self._desk.mark_all()
        later = [host.steady_since + STEADY for host in self._world.hosts.values() if host.steady_since > now - STEADY]
        if later:
            self._desk.arm(min(later), Timer.STEADY)

    def _changed(self) -> None:
        self._desk.mark_all()
        self._desk.unblock()
