"""When a job that a host runs counts as up: its service lists it, and the routers that lead there have it."""

from __future__ import annotations

from datetime import datetime, timedelta

from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.events import WatchServices
from flynn.scheduler.model import Formation, Job, JobID, JobState
from flynn.scheduler.routers import RouterBoard

DEPLOY_TIMEOUT = 120  # seconds, of an app that says nothing
AFTER_DEPLOYMENT = timedelta(seconds=30)
ROUTER_PATIENCE = timedelta(seconds=10)  # so long a job in service waits for routers that have not picked it up


class Readiness:
    def __init__(self, desk: Desk) -> None:
        self.board = RouterBoard()
        self._desk = desk
        self._world = desk.world
        self._listed_in: dict[str, frozenset[JobID]] = {}  # service -> jobs it lists
        self._since: dict[JobID, datetime] = {}
        self._watched: frozenset[str] = frozenset()

    def in_service(self, job: Job, now: datetime) -> bool:
        """Whether requests can reach the job; true for a type without a service."""
        service = self.service_of(job)
        if not service:
            return True
        since = self._since.get(job.id)
        if since is None:
            return False
        if self.board.everywhere(service, job.id) or now >= since + ROUTER_PATIENCE:
            return True
        self._desk.at(since + ROUTER_PATIENCE, Timer.READY, job.id)
        return False

    def became_ready(self, id: JobID, now: datetime) -> Job | None:
        """Return the job if it was not up so far, and is in service now."""
        job = self._world.jobs.get(id)
        if job is None or id not in self._since or job.state not in (JobState.PENDING, JobState.STARTING):
            return None
        return job if self.service_of(job) and self.in_service(job, now) else None

    def service_listed(self, service: str, jobs: frozenset[JobID], now: datetime) -> list[JobID]:
        """Take in whom a service lists now. Returns those it did not list before."""
        before = self._listed_in.get(service, frozenset())
        self._listed_in[service] = jobs
        for id in sorted(before - jobs):
            self._since.pop(id, None)
        new = sorted(jobs - before)
        self._since.update(dict.fromkeys(new, now))
        return new

    def knows(self, job: Job) -> bool:
        """Whether the directory has said whom the job's service lists."""
        return self.service_of(job) in self._listed_in

    def start_limit(self, job: Job) -> timedelta | None:
        """How long a job that its host runs may take to be in service. None for those that are waited for for ever.

        That is what its app allows a deployment, whose verdict comes first. The platform's base is never given up: the
        directory itself may be what is missing.
        """
        formation = self._world.formations.get(job.key)
        if formation is None or not self.service_of(job) or formation.app.critical:
            return None
        return timedelta(seconds=formation.app.deploy_timeout or DEPLOY_TIMEOUT) + AFTER_DEPLOYMENT

    def service_of(self, job: Job) -> str:
        formation = self._world.formations.get(job.key) if job.in_formation else None
        return formation.process(job.type).service if formation is not None else ""

    def serves(self, job: Job | None) -> bool:
        """Whether requests may be under way to it; so it is to be assumed of jobs nothing is known of."""
        formation = self._world.formations.get(job.key) if job is not None else None
        return formation is None or job is None or _serves(formation, job.type)

    def watch(self) -> None:
        """Have exactly the services followed that active formations name."""
        wanted = frozenset(
            service
            for formation in self._world.formations.values()
            if formation.active
            for service in formation.services
        )
        if wanted == self._watched:
            return
        for service in self._watched - wanted:
            for id in self._listed_in.pop(service, ()):
                self._since.pop(id, None)
        self._watched = wanted
        self._desk.ask(WatchServices(wanted))


def _serves(formation: Formation, type: str) -> bool:
    process = formation.process(type)
    return bool(process.service) or any(port.service is not None for port in process.ports)
