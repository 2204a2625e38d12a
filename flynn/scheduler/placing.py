"""From "so many more jobs" to requests to hosts: which host gets which pending job, and what if it does not take it."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import datetime, timedelta

from flynn.scheduler import job_state, placement
from flynn.scheduler.desk import Desk, Timer
from flynn.scheduler.events import PersistJob, StartDone, StartJob
from flynn.scheduler.jobs import JobBook
from flynn.scheduler.model import Formation, FormationKey, Host, HostID, HostPort, Job, JobID, JobState, VolumeID
from flynn.scheduler.reconcile import load_by_host
from flynn.scheduler.restarts import Restarts
from flynn.scheduler.volumes import VolumeBook

log = logging.getLogger(__name__)

LEAVING_PAUSE = timedelta(milliseconds=200)  # between looks at whether the job to be waited for has ended


class Placing:
    def __init__(self, desk: Desk, jobs: JobBook, volumes: VolumeBook, restarts: Restarts) -> None:
        self._desk = desk
        self._world = desk.world
        self._jobs = jobs
        self._volumes = volumes
        self._restarts = restarts

    def create(self, formation: Formation, type: str, count: int, now: datetime) -> None:
        """Make jobs that wait to be placed. Those that replace ended ones go on with their counts."""
        ended = self._restarts.pending(formation.key, type)
        for index in range(count):
            job = self._new(formation, type, now)
            run_at = None
            if index < len(ended):
                run_at = now + ended[index].delay if ended[index].delay else None
                reason = f"has ended {ended[index].restarts} times, starts again later" if run_at else ""
                job = replace(job, restarts=ended[index].restarts, run_at=run_at, reason=reason)
            self._world.put_job(job)
            self._desk.to_place[job.id] = None
            if run_at is not None:
                self._desk.ask(PersistJob(job))

    def create_on(self, host: Host, formation: Formation, type: str, now: datetime) -> JobID:
        """Have one job more started, on a host that has been chosen. Its type has no volumes."""
        job = self._new(formation, type, now)
        self._world.put_job(job)
        self.start(formation, job, placement.Chosen(host), now)
        return job.id

    def _new(self, formation: Formation, type: str, now: datetime) -> Job:
        return Job(
            id=JobID(self._desk.new_id()),
            app=formation.app.id,
            release=formation.release.id,
            type=type,
            state=JobState.PENDING,
            created_at=now,
            args=tuple(formation.process(type).args),
            memory=formation.memory_of(type),
        )

    def place(self, now: datetime) -> None:
        """Find hosts for the jobs that may be started now."""
        groups: dict[tuple[FormationKey, str], list[Job]] = defaultdict(list)
        for id in list(self._desk.to_place):
            del self._desk.to_place[id]
            job = self._world.jobs.get(id)
            if job is None or job.state is not JobState.PENDING or id in self._desk.starting:
                continue
            if job.run_at is not None and job.run_at > now:
                self._desk.at(job.run_at, Timer.START, id)
                continue
            groups[job.key, job.type].append(job)
        if not groups:
            return
        hosts = list(self._world.hosts.values())
        self._desk.random.shuffle(hosts)
        for (key, type), jobs in groups.items():
            formation = self._world.formations.get(key)
            if formation is not None:
                self._place_group(formation, type, jobs, hosts, now)

    def _place_group(self, formation: Formation, type: str, jobs: list[Job], hosts: list[Host], now: datetime) -> None:
        if reason := self._restarts.waits_for(formation, type, now):
            for job in jobs:
                self._desk.note(job, reason)
                self._desk.at(now + LEAVING_PAUSE, Timer.START, job.id)
            return
        waiting = {job.id for job in jobs}
        needs = self._needs(formation, type)
        load = load_by_host((job for job in self._world.jobs_of(formation.key) if job.id not in waiting), type)
        start = self._desk.random.randrange(len(hosts)) if hosts else 0
        one_by_one = [job for job in jobs if job.avoid is not None] if not formation.volume_requests(type) else jobs
        for job in one_by_one:
            self._place_one(formation, job, needs, hosts, start, load, now)
        together = [job for job in jobs if job.avoid is None] if one_by_one is not jobs else []
        if not together:
            return
        found = placement.spread(
            placement.rotated(hosts, start),
            load,
            needs,
            len(together),
            reserved=self._world.reserved,
            prefer_healthy=not formation.process(type).omni,
        )
        for job, host in zip(together, found, strict=False):
            self.start(formation, job, placement.Chosen(host), now)
        for job in together[len(found) :]:
            self._jobs.apply(job, job_state.NoPlace(needs.refusal(hosts)), now)

    def _needs(self, formation: Formation, type: str) -> placement.Needs:
        ports = formation.host_ports(type)
        omni = formation.process(type).omni
        return placement.Needs(
            tags=formation.tags_of(type),
            memory=formation.memory_of(type),
            ports=ports,
            taken=self._hosts_with(ports, of_others_than=formation.app.id) if ports else frozenset(),
            # Of an omni type there is one on each host anyway, but for the moment when one takes another one's place.
            alone=bool(ports) and not omni,
        )

    def _hosts_with(self, ports: frozenset[HostPort], of_others_than: str) -> frozenset[HostID]:
        """Hosts where other apps have one of these ports. Within an app its strategy says what may run together."""
        return frozenset(
            job.host
            for key, other in self._world.formations.items()
            if key.app != of_others_than
            for type in other.release.processes
            if ports & other.host_ports(type)
            for job in self._world.jobs_of(key)
            if job.type == type and job.host is not None and (job.state.counts or job.state is JobState.STOPPING)
        )

    def _place_one(
        self,
        formation: Formation,
        job: Job,
        needs: placement.Needs,
        hosts: list[Host],
        start: int,
        load: Counter[HostID],
        now: datetime,
    ) -> None:
        # Volumes of an attempt that failed before they were created are forgotten; created ones are free to be taken.
        self._volumes.release(job, now)
        verdict = placement.place(
            formation,
            job.type,
            job.id,
            hosts,
            placement.rotated(hosts, start),
            load,
            self._world.volumes_of(formation, job.type),
            needs=needs,
            reserved=self._world.reserved,
            avoid=job.avoid,
            new_volume_id=lambda: VolumeID(self._desk.new_id()),
        )
        match verdict:
            case placement.Refused(reason):
                self._jobs.apply(job, job_state.NoPlace(reason), now)
            case placement.Chosen():
                load[verdict.host.id] += 1
                self.start(formation, job, verdict, now)

    def start(self, formation: Formation, job: Job, chosen: placement.Chosen, now: datetime) -> None:
        """Have a host asked to run the job."""
        volumes = tuple(replace(volume, job=job.id) for volume in chosen.volumes)
        for volume in volumes:
            self._volumes.put(volume)
        event = job_state.Placed(chosen.host.id, tuple(volume.id for volume in volumes), now)
        placed = self._jobs.apply(job, event, now)
        self._desk.starting.add(job.id)
        self._desk.counts["starts"] += 1
        self._desk.ask(StartJob(placed, formation, volumes))

    def start_done(self, event: StartDone, now: datetime) -> None:
        """The host has taken the job, or has not."""
        self._desk.starting.discard(event.job)
        for id in event.volumes:
            self._volumes.created(id, now)
        job = self._world.jobs.get(event.job)
        if job is None:
            return
        if not event.error:
            if job.state is JobState.PENDING and job.host == event.host:
                self._world.put_job(replace(job, touched_at=now))
            return
        self._desk.counts["failed_starts"] += 1
        log.warning(
            "start failed",
            extra={"job": f"{event.host}-{event.job}", "attempt": job.attempts + 1, "error": event.error},
        )
        if self._desk.leader:
            after = self._jobs.apply(job, job_state.StartFailed(event.host, event.error, now), now)
            if after.state is JobState.PENDING and after.run_at is not None:
                self._desk.at(after.run_at, Timer.START, after.id)
