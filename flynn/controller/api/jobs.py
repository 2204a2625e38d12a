"""Jobs: the scheduler's records, kills, and one-off runs. spec/controller section 7.6."""

from __future__ import annotations

from flynn.controller.api.parameters import INSIDERS_WITH_KEY, body_of
from flynn.controller.hosts import Hosts
from flynn.controller.oneoff import OneOffRuns
from flynn.controller.stores import Stores
from flynn.host.attach import PROTOCOL
from flynn.http.connection import splice
from flynn.http.server import Api, Request
from flynn.types.codec import replace
from flynn.types.errors import ValidationError
from flynn.types.job import Job, NewJob


class JobsApi:
    """Endpoints of jobs."""

    def __init__(self, stores: Stores, hosts: Hosts) -> None:
        self._apps = stores.apps
        self._jobs = stores.jobs
        self._hosts = hosts
        self._runs = OneOffRuns(stores, hosts)

    def mount(self, api: Api) -> None:
        """Add the endpoints."""
        for method, path, handler in (
            ("GET", "/active-jobs", self.active),
            ("GET", "/apps/{app}/jobs", self.of_app),
            ("POST", "/apps/{app}/jobs", self.run),
            ("GET", "/apps/{app}/jobs/{job}", self.get),
            ("PUT", "/apps/{app}/jobs/{job}", self.put),
            ("DELETE", "/apps/{app}/jobs/{job}", self.kill),
        ):
            api.route(method, path, handler, allow=INSIDERS_WITH_KEY)

    async def active(self, request: Request) -> list[Job]:
        return await self._jobs.active()

    async def of_app(self, request: Request) -> list[Job]:
        app = await self._apps.get(request.path("app"))
        return await self._jobs.all(app.id)

    async def get(self, request: Request) -> Job:
        return await self._jobs.get(request.path("job"))

    async def put(self, request: Request) -> Job:
        job = await body_of(request, Job)
        return await self._jobs.put(job if job.uuid else replace(job, uuid=request.path("job")))

    async def kill(self, request: Request) -> None:
        job = await self._jobs.get(request.path("job"))
        if not job.id or not job.host_id:
            raise ValidationError("", "cannot kill a job which has not been placed on a host")
        async with self._hosts.open(job.host_id) as host:
            await host.stop_job(job.id)

    async def run(self, request: Request) -> Job | None:
        planned = await self._runs.plan(request.path("app"), await body_of(request, NewJob))
        if PROTOCOL not in request.header("Upgrade"):
            return await self._runs.run_detached(planned)
        async with self._runs.run_attached(planned) as host:
            async with await request.upgrade(PROTOCOL) as client:
                await splice(client, host)
        return None
