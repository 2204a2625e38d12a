"""Typed client of the controller API; what the CLI can do, any program can do with it.

`outside(url, key, pin)` is for people and tools that come through the router; `inside(key, identity)` for the cluster's
own daemons, which show their certificate as well. Both give a `Controller`. Errors are the `ApiError` classes the
server raised. Everything is named after the resource it returns; `spec/controller.md` sections 5 to 8 are the contract.

Event streams come in two kinds. `follow_events` reconnects by itself and never repeats or loses an event. The state
streams (`follow_formations`, `follow_volumes`, `follow_sinks`) last one connection: reconnect with a new `since`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from urllib.parse import quote, urlencode

from flynn.controller.wire import (
    AppDeletion,
    AppUpdate,
    DeletedApp,
    DeletedRelease,
    DomainMigration,
    LogChunk,
    ReleaseDeletion,
    ReleaseRef,
)
from flynn.http.client import STREAM_SILENCE_SECONDS, HttpClient, KeyAuth, Pinned, Retry
from flynn.http.connection import RawConnection
from flynn.identity import Identity
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import ZERO_TIME, Wire, convert
from flynn.types.deployment import Deployment, DeploymentEvent, DeploymentStatus
from flynn.types.errors import ApiError, NotFound
from flynn.types.event import Event, EventType
from flynn.types.formation import ExpandedFormation, Formation, Processes, ScaleRequest, ScaleState, Tags
from flynn.types.job import Job, NewJob
from flynn.types.provider import Provider, Resource, ResourceReq
from flynn.types.release import Release
from flynn.types.route import Route
from flynn.types.sink import Sink
from flynn.types.status import StatusDocument
from flynn.types.volume import Volume

INSIDE_URL = "https://controller.discoverd:80"
ATTACH = "flynn-attach/0"

PATIENCE = Retry(within=timedelta(seconds=10))  # with refused connections and errors that say `retry`
LONG_CALL = 120.0  # seconds, for calls that wait for a job to start or stop, or for a provider
QUIET_LOG = 10 * 365 * 86400.0  # seconds without a line in a followed log: no broken connection, the app is quiet
SCALE_TIMEOUT = timedelta(seconds=30)
DELETION_TIMEOUT = timedelta(seconds=60)
OUTAGE_TOLERATED = timedelta(seconds=20)  # how long `follow_events` tries to reconnect
RECONNECT_EVERY = timedelta(milliseconds=100)
MAX_RECONNECT_PAUSE = timedelta(seconds=1)

T = TypeVar("T", bound=Wire)


class ScaleFailed(Exception):
    """A scale request was cancelled by a later one, or its jobs did not come up in time."""


class DeploymentFailed(Exception):
    """A deployment ended as failed; `str()` is the reason as the worker reported it."""


class DeletionFailed(Exception):
    """Deleting an app or a release ended with an error, which is the text, or was not done in time."""


def outside(url: str, key: str, pin: str | None = None) -> Controller:
    """Return a client that comes through the router, trusting the leaf certificate `pin` (base64 SHA-256) alone."""
    return Controller(HttpClient(url, auth=KeyAuth(key), tls=Pinned(pin) if pin else None, retry=PATIENCE))


def inside(key: str, identity: Identity, *, url: str = INSIDE_URL) -> Controller:
    """Return a client for daemons of the cluster: their certificate and the controller key."""
    return Controller(HttpClient(url, auth=KeyAuth(key), tls=identity, retry=PATIENCE))


class Controller:
    """The controller API. Apps are named by id or by name wherever `app` is a parameter."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def __aenter__(self) -> Controller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _call(self, method: str, path: str, body: object = None, *, answer: type[T], timeout: float) -> T:
        result = await self._http.call(method, path, body, answer=answer, timeout=timeout)
        assert result is not None
        return result

    # Apps

    async def create_app(self, app: App) -> App:
        """Create an app; name and id are made up where they are empty. Raises `ObjectExists`."""
        return await self._http.post("/apps", app, answer=App)

    async def app(self, app: str) -> App:
        """Return one app. Raises `NotFound`."""
        return await self._http.get(_path("apps", app), answer=App)

    async def apps(self) -> list[App]:
        """Return all apps, newest first."""
        return await self._http.get("/apps", answer=list[App])

    async def update_app(self, app: str, update: AppUpdate) -> App:
        """Change metadata (replaced as a whole), strategy or time limit; what is None stays."""
        return await self._http.post(_path("apps", app), update, answer=App)

    async def set_app_meta(self, app: str, meta: Mapping[str, str]) -> App:
        """Replace the metadata; empty clears it."""
        return await self._http.post(_path("apps", app, "meta"), AppUpdate(meta=dict(meta)), answer=App)

    async def request_app_deletion(self, app: str) -> None:
        """Queue the deletion of an app; an `app_deletion` event tells when it is done."""
        await self._http.delete(_path("apps", app))

    async def delete_app(self, app: str, *, timeout: timedelta = DELETION_TIMEOUT) -> DeletedApp:
        """Delete an app with its routes, releases and own resources, and wait until that is done.

        Raises:
            DeletionFailed: the worker reported an error, or did not finish in time.
        """
        target = await self.app(app)
        event = await self._deletion(
            EventType.APP_DELETION, target.id, target.id, lambda: self.request_app_deletion(target.id), timeout
        )
        outcome = convert(event.data, AppDeletion)
        if outcome.error:
            raise DeletionFailed(outcome.error)
        return outcome.app_deletion or DeletedApp(app=target.id)

    async def collect_garbage(self, app: str) -> None:
        """Queue the removal of old inactive releases."""
        await self._http.post(_path("apps", app, "gc"), None)

    async def app_release(self, app: str) -> Release:
        """Return the app's current release. Raises `NotFound` when there is none."""
        return await self._http.get(_path("apps", app, "release"), answer=Release)

    async def set_app_release(self, app: str, release: str) -> Release:
        """Make a release the current one without scaling anything."""
        return await self._http.put(_path("apps", app, "release"), ReleaseRef(id=release), answer=Release)

    async def app_releases(self, app: str) -> list[Release]:
        """Return an app's releases, newest first."""
        return await self._http.get(_path("apps", app, "releases"), answer=list[Release])

    # Releases and artifacts

    async def create_artifact(self, artifact: Artifact) -> Artifact:
        """Store an artifact, fetching its manifest from the URI if none is given. Same type and URI: the stored one."""
        return await self._http.post("/artifacts", artifact, answer=Artifact)

    async def artifact(self, artifact: str) -> Artifact:
        """Return one artifact."""
        return await self._http.get(_path("artifacts", artifact), answer=Artifact)

    async def artifacts(self) -> list[Artifact]:
        """Return all artifacts, newest first."""
        return await self._http.get("/artifacts", answer=list[Artifact])

    async def create_release(self, release: Release) -> Release:
        """Store a release of app `release.app_id` (an id, not a name)."""
        return await self._http.post("/releases", release, answer=Release)

    async def release(self, release: str) -> Release:
        """Return one release."""
        return await self._http.get(_path("releases", release), answer=Release)

    async def releases(self) -> list[Release]:
        """Return all releases, newest first."""
        return await self._http.get("/releases", answer=list[Release])

    async def request_release_deletion(self, app: str, release: str) -> None:
        """Delete a release of an app; a `release_deletion` event tells when its files are gone as well."""
        await self._http.delete(_path("apps", app, "releases", release))

    async def delete_release(self, app: str, release: str, *, timeout: timedelta = DELETION_TIMEOUT) -> DeletedRelease:
        """Delete a release and its files, and wait until that is done.

        Raises:
            ValidationError: it is the current release of an app.
            DeletionFailed: the worker reported an error, or did not finish in time.
        """
        target = await self.app(app)
        event = await self._deletion(
            EventType.RELEASE_DELETION,
            target.id,
            release,
            lambda: self.request_release_deletion(target.id, release),
            timeout,
        )
        outcome = convert(event.data, ReleaseDeletion)
        if outcome.error:
            raise DeletionFailed(outcome.error)
        return outcome.release_deletion or DeletedRelease(app=target.id, release=release)

    # Formations and scaling

    async def formation(self, app: str, release: str) -> Formation:
        """Return how a release is scaled. Raises `NotFound`."""
        return await self._http.get(_path("apps", app, "formations", release), answer=Formation)

    async def expanded_formation(self, app: str, release: str) -> ExpandedFormation:
        """Return a formation with its app, release and artifacts."""
        path = _path("apps", app, "formations", release) + "?expand=true"
        return await self._http.get(path, answer=ExpandedFormation)

    async def formations(self, app: str) -> list[Formation]:
        """Return an app's formations, newest first."""
        return await self._http.get(_path("apps", app, "formations"), answer=list[Formation])

    async def active_formations(self) -> list[ExpandedFormation]:
        """Return all formations with at least one process, most recently changed first."""
        return await self._http.get("/formations?active=true", answer=list[ExpandedFormation])

    async def put_formation(self, formation: Formation) -> Formation:
        """Request the counts of `formation`, without waiting for the jobs. Types left out keep their count."""
        path = _path("apps", formation.app, "formations", formation.release)
        return await self._http.put(path, formation, answer=Formation)

    async def delete_formation(self, app: str, release: str) -> None:
        """Scale a release to nothing and forget its formation."""
        await self._http.delete(_path("apps", app, "formations", release))

    def follow_formations(self, since: datetime = ZERO_TIME) -> AsyncIterator[ExpandedFormation]:
        """Yield live formations changed since then, one without `app` meaning "caught up", then every change.

        A formation may come several times; one with `deleted` is gone. One connection: the end is an error or None.
        """
        return self._http.events("/formations?" + urlencode({"since": _rfc3339(since)}), ExpandedFormation)

    async def put_scale_request(self, request: ScaleRequest) -> ScaleRequest:
        """Create a scale request (`state` pending), or set the state of request `id` (any other state)."""
        path = _path("apps", request.app, "scale", request.release)
        return await self._http.put(path, request, answer=ScaleRequest)

    async def scale(
        self,
        app: str,
        release: str,
        processes: Processes,
        *,
        tags: Tags | None = None,
        timeout: timedelta = SCALE_TIMEOUT,
        on_created: Callable[[ScaleRequest], None] | None = None,
        on_job: Callable[[Job], None] | None = None,
    ) -> ScaleRequest:
        """Scale the given types of a release and wait until the jobs are there.

        `on_created` sees the request as the controller took it, `on_job` every job event of the release meanwhile;
        what they raise ends the wait.

        Raises:
            ScaleFailed: cancelled by a later request, or not done within `timeout`.
        """
        target = await self.app(app)
        request = ScaleRequest(
            app=target.id, release=release, state=ScaleState.PENDING, new_processes=processes, new_tags=tags
        )
        waiting: dict[str, Job] = {}
        types = [EventType.JOB, EventType.SCALE_REQUEST, EventType.SCALE_REQUEST_CANCELATION]
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                async with self._subscribed(app_id=target.id, object_types=types) as events:
                    created = await self.put_scale_request(request)
                    if on_created is not None:
                        on_created(created)
                    async for event in events:
                        if event.object_type == EventType.JOB:
                            job = convert(event.data, Job)
                            if job.release != release:
                                continue
                            waiting.pop(job.uuid, None)
                            if job.waits and job.reason:
                                waiting[job.uuid] = job
                            if on_job is not None:
                                on_job(job)
                            continue
                        seen = convert(event.data, ScaleRequest)
                        if seen.id != created.id:
                            continue
                        if seen.state == ScaleState.COMPLETE:
                            return seen
                        if seen.state == ScaleState.CANCELLED:
                            raise ScaleFailed("scale request cancelled")
        except TimeoutError:
            waited = timeout.total_seconds()
            why = "".join(f"; {job.type} is {job.state}: {job.reason}" for job in [*waiting.values()][:1])
            raise ScaleFailed(f"timed out waiting for scale to complete (waited {waited:g} seconds){why}") from None
        raise ScaleFailed("the event stream ended")

    # Jobs

    async def jobs(self, app: str) -> list[Job]:
        """Return all jobs an app ever had, newest first."""
        return await self._http.get(_path("apps", app, "jobs"), answer=list[Job])

    async def job(self, app: str, job: str) -> Job:
        """Return one job by UUID or by cluster id."""
        return await self._http.get(_path("apps", app, "jobs", job), answer=Job)

    async def active_jobs(self) -> list[Job]:
        """Return the jobs of all apps that are pending, starting, up or stopping."""
        return await self._http.get("/active-jobs", answer=list[Job])

    async def put_job(self, job: Job) -> Job:
        """Record a job's state; the scheduler's call."""
        return await self._http.put(_path("apps", job.app, "jobs", job.uuid), job, answer=Job)

    async def kill_job(self, app: str, job: str) -> None:
        """Stop a job; the scheduler replaces it if its formation still wants it."""
        await self._http.call("DELETE", _path("apps", app, "jobs", job), timeout=LONG_CALL)

    async def run_job(self, app: str, job: NewJob) -> Job:
        """Start a one-off job and return at once."""
        return await self._call("POST", _path("apps", app, "jobs"), job, answer=Job, timeout=LONG_CALL)

    @asynccontextmanager
    async def run_job_attached(self, app: str, job: NewJob) -> AsyncIterator[RawConnection]:
        """Start a one-off job attached to its stdin, stdout and stderr: frames of `flynn.host.attach`."""
        async with await self._http.upgrade(_path("apps", app, "jobs"), job, ATTACH) as connection:
            yield connection

    # Deployments

    async def create_deployment(self, app: str, release: str) -> Deployment:
        """Ask for `release` to replace the current one. `finished_at` is set if nothing had to be done."""
        return await self._http.post(_path("apps", app, "deploy"), ReleaseRef(id=release), answer=Deployment)

    async def deployment(self, deployment: str) -> Deployment:
        """Return one deployment."""
        return await self._http.get(_path("deployments", deployment), answer=Deployment)

    async def deployments(self, app: str) -> list[Deployment]:
        """Return an app's deployments, newest first."""
        return await self._http.get(_path("apps", app, "deployments"), answer=list[Deployment])

    async def follow_deployment(self, deployment: Deployment) -> AsyncIterator[DeploymentEvent]:
        """Yield the deployment's events from its beginning; ends after `complete` or `failed`."""
        events = self.follow_events(
            app_id=deployment.app, object_types=[EventType.DEPLOYMENT], object_id=deployment.id, past=True
        )
        async for event in events:
            progress = convert(event.data, DeploymentEvent)
            yield progress
            if progress.status in (DeploymentStatus.COMPLETE, DeploymentStatus.FAILED):
                return

    async def deploy(
        self,
        app: str,
        release: str,
        *,
        timeout: timedelta | None = None,
        on_progress: Callable[[DeploymentEvent], None] | None = None,
    ) -> Deployment:
        """Deploy `release` and wait for the end, without limit unless `timeout` is given.

        Raises:
            DeploymentFailed: with the worker's reason; the old release has its counts back.
            TimeoutError: not done in time; the deployment goes on.
        """
        deployment = await self.create_deployment(app, release)
        if deployment.finished_at is not None:
            return deployment
        async with asyncio.timeout(timeout.total_seconds() if timeout else None):
            async for progress in self.follow_deployment(deployment):
                if on_progress is not None:
                    on_progress(progress)
                if progress.status == DeploymentStatus.FAILED:
                    raise DeploymentFailed(progress.error or "unknown error")
        return await self.deployment(deployment.id)

    # Events

    async def event(self, event: int) -> Event:
        """Return one event."""
        return await self._http.get(f"/events/{event}", answer=Event)

    async def events(
        self,
        *,
        app_id: str = "",
        object_types: Iterable[str] = (),
        object_id: str = "",
        before_id: int | None = None,
        since_id: int | None = None,
        count: int | None = None,
    ) -> list[Event]:
        """Return stored events, newest first; both ids are exclusive."""
        query = _event_query(app_id, object_types, object_id, before_id=before_id, since_id=since_id, count=count)
        return await self._http.get("/events" + query, answer=list[Event])

    async def follow_events(
        self,
        *,
        app_id: str = "",
        object_types: Iterable[str] = (),
        object_id: str = "",
        past: bool = False,
        count: int | None = None,
        last_id: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Yield events as they happen; with `past`, stored ones first (the latest `count` of them).

        Reconnects by itself and goes on after the last event it has yielded; gives up with the error when there was
        no connection for 20 seconds, or at once for `NotFound`.
        """
        types = list(object_types)
        loop = asyncio.get_running_loop()
        lost_since: float | None = None
        pause = RECONNECT_EVERY.total_seconds()
        first = True
        while True:
            replay = past and first and not last_id
            query = _event_query(
                app_id, types, object_id, past="true" if replay else None, count=count if replay else None
            )
            try:
                stream = self._http.events("/events" + query, Event, headers={"Last-Event-Id": str(last_id)})
                async for event in stream:
                    first, lost_since, pause = False, None, RECONNECT_EVERY.total_seconds()
                    if event.id > last_id:
                        last_id = event.id
                        yield event
            except NotFound:
                raise
            except ApiError:
                now = loop.time()
                lost_since = now if lost_since is None else lost_since
                if now - lost_since > OUTAGE_TOLERATED.total_seconds():
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_RECONNECT_PAUSE.total_seconds())

    @asynccontextmanager
    async def _subscribed(self, *, app_id: str, object_types: Iterable[str]) -> AsyncIterator[AsyncIterator[Event]]:
        """Follow events from now on: whatever happens after the block was entered is in the iterator.

        The place in the history is fixed by the newest event's id, so that a subscription which is established late,
        or again, still delivers everything.
        """
        newest = await self.events(count=1)
        stream = self.follow_events(
            app_id=app_id, object_types=object_types, last_id=newest[0].id if newest else 0, past=not newest
        )
        try:
            yield stream
        finally:
            await stream.aclose()

    async def _deletion(
        self, kind: EventType, app_id: str, object_id: str, ask: Callable[[], Awaitable[None]], timeout: timedelta
    ) -> Event:
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                async with self._subscribed(app_id=app_id, object_types=[kind]) as events:
                    await ask()
                    async for event in events:
                        if event.object_id == object_id:
                            return event
        except TimeoutError:
            raise DeletionFailed(f"timed out waiting for the {kind} event") from None
        raise DeletionFailed("the event stream ended")

    # Providers and resources

    async def create_provider(self, provider: Provider) -> Provider:
        """Register a resource provider by name and URL."""
        return await self._http.post("/providers", provider, answer=Provider)

    async def provider(self, provider: str) -> Provider:
        """Return one provider by id or name."""
        return await self._http.get(_path("providers", provider), answer=Provider)

    async def providers(self) -> list[Provider]:
        """Return all providers, newest first."""
        return await self._http.get("/providers", answer=list[Provider])

    async def provision_resource(self, provider: str, request: ResourceReq) -> Resource:
        """Have a provider make a resource (a database, mostly) for some apps; its env is in the answer."""
        return await self._call(
            "POST", _path("providers", provider, "resources"), request, answer=Resource, timeout=LONG_CALL
        )

    async def put_resource(self, resource: Resource) -> Resource:
        """Record a resource that exists already."""
        path = _path("providers", resource.provider, "resources", resource.id)
        return await self._http.put(path, resource, answer=Resource)

    async def resource(self, provider: str, resource: str) -> Resource:
        """Return one resource."""
        return await self._http.get(_path("providers", provider, "resources", resource), answer=Resource)

    async def resources(self) -> list[Resource]:
        """Return all resources, newest first."""
        return await self._http.get("/resources", answer=list[Resource])

    async def provider_resources(self, provider: str) -> list[Resource]:
        """Return a provider's resources."""
        return await self._http.get(_path("providers", provider, "resources"), answer=list[Resource])

    async def app_resources(self, app: str) -> list[Resource]:
        """Return the resources an app is linked to."""
        return await self._http.get(_path("apps", app, "resources"), answer=list[Resource])

    async def delete_resource(self, provider: str, resource: str) -> Resource:
        """Have the provider remove a resource with its data."""
        path = _path("providers", provider, "resources", resource)
        return await self._call("DELETE", path, answer=Resource, timeout=LONG_CALL)

    async def link_resource(self, provider: str, resource: str, app: str) -> Resource:
        """Link an existing resource to one more app."""
        path = _path("providers", provider, "resources", resource, "apps", app)
        return await self._http.put(path, None, answer=Resource)

    async def unlink_resource(self, provider: str, resource: str, app: str) -> Resource:
        """Remove the link between a resource and an app."""
        path = _path("providers", provider, "resources", resource, "apps", app)
        return await self._http.delete(path, answer=Resource)

    # Routes

    async def routes(self) -> list[Route]:
        """Return the routes of all apps with their certificates and private keys; the router's call."""
        return await self._http.get("/routes", answer=list[Route])

    async def app_routes(self, app: str) -> list[Route]:
        """Return an app's routes, newest first."""
        return await self._http.get(_path("apps", app, "routes"), answer=list[Route])

    async def route(self, app: str, route_type: str, route: str) -> Route:
        """Return one route."""
        return await self._http.get(_path("apps", app, "routes", route_type, route), answer=Route)

    async def create_route(self, app: str, route: Route) -> Route:
        """Create a route. Raises `Conflict` for a duplicate or a reserved port."""
        return await self._http.post(_path("apps", app, "routes"), route, answer=Route)

    async def update_route(self, app: str, route: Route) -> Route:
        """Change a route; hand in the whole of it."""
        return await self._http.put(_path("apps", app, "routes", route.type, route.id), route, answer=Route)

    async def delete_route(self, app: str, route_type: str, route: str) -> None:
        """Remove a route."""
        await self._http.delete(_path("apps", app, "routes", route_type, route))

    # Volumes and sinks

    async def volumes(self) -> list[Volume]:
        """Return all volumes in the books, most recently changed first."""
        return await self._http.get("/volumes", answer=list[Volume])

    async def app_volumes(self, app: str) -> list[Volume]:
        """Return an app's volumes."""
        return await self._http.get(_path("apps", app, "volumes"), answer=list[Volume])

    async def volume(self, app: str, volume: str) -> Volume:
        """Return one volume."""
        return await self._http.get(_path("apps", app, "volumes", volume), answer=Volume)

    async def put_volume(self, volume: Volume) -> Volume:
        """Record a volume; the scheduler's call."""
        return await self._http.put(_path("volumes", volume.id), volume, answer=Volume)

    async def decommission_volume(self, app: str, volume: Volume) -> Volume:
        """Mark a volume as not to be used again."""
        path = _path("apps", app, "volumes", volume.id, "decommission")
        return await self._http.put(path, volume, answer=Volume)

    def follow_volumes(self, since: datetime = ZERO_TIME) -> AsyncIterator[Volume]:
        """Yield volumes changed since then, one without an id meaning "caught up", then every change."""
        return self._http.events("/volumes?" + urlencode({"since": _rfc3339(since)}), Volume)

    async def create_sink(self, sink: Sink) -> Sink:
        """Store a log sink."""
        return await self._http.post("/sinks", sink, answer=Sink)

    async def sinks(self) -> list[Sink]:
        """Return all log sinks."""
        return await self._http.get("/sinks", answer=list[Sink])

    async def sink(self, sink: str) -> Sink:
        """Return one log sink."""
        return await self._http.get(_path("sinks", sink), answer=Sink)

    async def delete_sink(self, sink: str) -> Sink:
        """Remove a log sink."""
        return await self._http.delete(_path("sinks", sink), answer=Sink)

    def follow_sinks(self, since: datetime = ZERO_TIME) -> AsyncIterator[Sink]:
        """Yield sinks changed since then, one without an id meaning "caught up", then changes; no config = removed."""
        return self._http.events("/sinks?" + urlencode({"since": _rfc3339(since)}), Sink)

    # Logs and the cluster

    @asynccontextmanager
    async def app_log(
        self,
        app: str,
        *,
        follow: bool = False,
        lines: int | None = None,
        job_id: str = "",
        process_type: str | None = None,
        stream_types: Iterable[str] = (),
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open an app's log: chunks of JSON lines, each a `LogMessage`. An empty `process_type` means one-off jobs."""
        path = _path("apps", app, "log") + _log_query(follow, lines, job_id, process_type, stream_types)
        async with self._http.download(path, silence=QUIET_LOG if follow else STREAM_SILENCE_SECONDS) as (_, chunks):
            yield chunks

    def app_log_events(
        self,
        app: str,
        *,
        follow: bool = False,
        lines: int | None = None,
        job_id: str = "",
        process_type: str | None = None,
        stream_types: Iterable[str] = (),
    ) -> AsyncIterator[LogChunk]:
        """Yield an app's log as messages; the last one has `event` "eof"."""
        path = _path("apps", app, "log") + _log_query(follow, lines, job_id, process_type, stream_types)
        return self._http.events(path, LogChunk)

    async def ca_cert(self) -> bytes:
        """Return the cluster's CA certificate as PEM."""
        async with self._http.download("/ca-cert") as (_, chunks):
            return b"".join([chunk async for chunk in chunks])

    async def status(self) -> StatusDocument:
        """Return the controller's own health."""
        return await self._http.get("/.well-known/status", answer=StatusDocument)

    async def migrate_domain(self, migration: DomainMigration) -> DomainMigration:
        """Ask for the cluster to move to another domain; `domain_migration` events tell how it goes."""
        return await self._http.put("/domain", migration, answer=DomainMigration)

    def backup(self) -> AbstractAsyncContextManager[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        """Open a tar of the whole cluster's state."""
        return self._http.download("/backup")


def _path(*parts: str) -> str:
    """Join path segments, each quoted: names come from users."""
    return "".join("/" + quote(part, safe="") for part in parts)


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _event_query(app_id: str, object_types: Iterable[str], object_id: str, **rest: object) -> str:
    fields: dict[str, object] = {
        "app_id": app_id,
        "object_types": ",".join(object_types),
        "object_id": object_id,
        **rest,
    }
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    return "?" + urlencode(given) if given else ""


def _log_query(
    follow: bool, lines: int | None, job_id: str, process_type: str | None, stream_types: Iterable[str]
) -> str:
    given: dict[str, object] = {}
    if follow:
        given["follow"] = "true"
    if lines is not None:
        given["lines"] = lines
    if job_id:
        given["job_id"] = job_id
    if process_type is not None:
        given["process_type"] = process_type
    if types := ",".join(stream_types):
        given["stream_types"] = types
    return "?" + urlencode(given) if given else ""
