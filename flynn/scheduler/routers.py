"""Which routers carry which backends: when a new job is reachable, and when an old one has been drained. Pure.

Routers tell their state as events. A router that goes away counts as having neither routes nor backends.
"""

from __future__ import annotations

from collections import defaultdict

from flynn.scheduler.model import JobID, RouterID


class RouterBoard:
    def __init__(self) -> None:
        self._routes: dict[str, set[RouterID]] = defaultdict(set)  # service -> routers with a route for it
        self._backends: dict[JobID, set[RouterID]] = {}  # routers in which the job is up
        self._service_of: dict[JobID, str] = {}

    def route_set(self, router: RouterID, service: str) -> None:
        self._routes[service].add(router)

    def route_removed(self, router: RouterID, service: str) -> list[JobID]:
        """Returns the jobs that are drained by this: no route, no traffic."""
        self._routes[service].discard(router)
        return [job for job, named in list(self._service_of.items()) if named == service and self._left(router, job)]

    def backend_up(self, router: RouterID, service: str, job: JobID) -> None:
        self._backends.setdefault(job, set()).add(router)
        self._service_of[job] = service

    def backend_drained(self, router: RouterID, job: JobID) -> list[JobID]:
        """Returns the job if this was the last router that had it."""
        return [job] if self._left(router, job) else []

    def router_gone(self, router: RouterID) -> list[JobID]:
        for routers in self._routes.values():
            routers.discard(router)
        return [job for job in list(self._backends) if self._left(router, job)]

    def _left(self, router: RouterID, job: JobID) -> bool:
        routers = self._backends.get(job)
        if routers is None or router not in routers:
            return False
        routers.discard(router)
        if routers:
            return False
        self.forget(job)
        return True

    def forget(self, job: JobID) -> None:
        self._backends.pop(job, None)
        self._service_of.pop(job, None)

    def carried(self, job: JobID) -> bool:
        """Whether some router has the job as a backend, so that its end has to be prepared."""
        return job in self._backends

    def everywhere(self, service: str, job: JobID) -> bool:
        """Whether every router with a route for the service has the job as a backend."""
        return self._routes.get(service, set()) <= self._backends.get(job, set())
