"""What each kind of step does. Every action may be run again after an interruption.

An action takes the step and gives the data it leaves behind. Random ids are recorded as an intention before they are
used, so that a second run finds what the first one made.
"""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flynn.aio.backoff import attempts
from flynn.bootstrap.certificates import pin_of, site_certificate
from flynn.bootstrap.cluster import EVERY, BootstrapError, Cluster, Host
from flynn.bootstrap.manifest import ResourceSpec, Step, capped
from flynn.bootstrap.record import Record
from flynn.bootstrap.template import Scope, render, render_environment
from flynn.controller.client import ScaleFailed
from flynn.jobspec import formation_job, with_legacy_defaults
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import Wire, always, builtins, convert, decode, replace
from flynn.types.errors import ApiError, Conflict, NotFound, ObjectExists, Unreachable
from flynn.types.formation import Formation
from flynn.types.host import JobEventKind, JobStatus, ResourceCheckPort, VolumeBinding
from flynn.types.instance import ServiceMeta
from flynn.types.provider import Provider, Provisioned, Resource
from flynn.types.release import Release
from flynn.types.route import Certificate
from flynn.types.volume import VolumeRequest

T = TypeVar("T")

SERVICE_WAIT = timedelta(minutes=2)
SCALE_WAIT = timedelta(minutes=5)
ROUTE_WAIT = timedelta(seconds=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    hosts: timedelta
    job: timedelta


class AppData(Wire):
    """What a step that runs an app leaves behind for later steps."""

    app: App
    release: Release
    artifacts: list[Artifact] = always([])
    processes: dict[str, int] = always({})
    resources: list[Resource] = always([])
    providers: list[ResourceSpec] = always([])


class Actions:
    """The actions by name; `perform` runs one."""

    def __init__(
        self,
        cluster: Cluster,
        record: Record,
        environment: Mapping[str, str],
        limits: Limits,
        *,
        singleton: bool,
    ) -> None:
        self._cluster = cluster
        self._record = record
        self._environment = environment
        self._limits = limits
        self._singleton = singleton

    async def perform(self, step: Step) -> dict[str, Any]:
        action: Callable[[Step], Awaitable[dict[str, Any] | None]] = ACTIONS[step.action].__get__(self)
        return await action(step) or {}

    def restore(self, step: Step, data: Mapping[str, Any]) -> None:
        """Take up what a step of an earlier run left for later calls."""
        if step.controller_key:
            self._cluster.controller_key = str(data.get("data", ""))

    @property
    def _scope(self) -> Scope:
        return Scope(
            step_data=self._record.data(),
            environment=self._environment,
            host_ips=self._cluster.host_ips,
            singleton=self._singleton,
        )

    def _render(self, text: str) -> str:
        return render(text, self._scope)

    # The cluster itself.

    async def require_env(self, step: Step) -> None:
        missing = [name for name in step.vars if not self._environment.get(name)]
        if missing:
            raise BootstrapError(f"missing required environment variables: {', '.join(missing)}")

    async def resource_check(self, step: Step) -> None:
        conflicts = []
        for host in self._cluster.hosts:
            try:
                await host.client.resource_check([ResourceCheckPort(port=p.port, proto=p.proto) for p in step.ports])
            except Conflict as error:
                ports = (error.detail or {}).get("ports", [])
                conflicts += [f"{host.id}: {port['proto']}:{port['port']}" for port in ports] or [str(error)]
        if conflicts:
            raise BootstrapError("conflicts detected! " + ", ".join(conflicts))

    async def wait_hosts(self, step: Step) -> None:
        directory = await self._cluster.directory()
        unready: list[str] = []
        async for _ in attempts(EVERY, self._limits.hosts):
            unready = []
            for host in self._cluster.hosts:
                status = await host.client.status()
                if not (status.network and status.network.subnet and status.discoverd and status.discoverd.url):
                    unready.append(host.id)
            try:
                listed = {instance.meta.get("id") for instance in await directory.instances("flynn-host")}
            except ApiError:
                listed = set()
            unready += [host.id for host in self._cluster.hosts if host.id not in listed and host.id not in unready]
            if not unready:
                return
        raise BootstrapError(f"timed out waiting for hosts to come up: {', '.join(unready)}")

    async def cluster_monitor(self, step: Step) -> None:
        directory = await self._cluster.directory()
        await directory.create("cluster-monitor")
        if await directory.get_meta("cluster-monitor") is None:
            data = {"enabled": step.enabled, "hosts": len(self._cluster.hosts)}
            await directory.put_meta("cluster-monitor", ServiceMeta(data=data))

    # Secrets.

    async def gen_random(self, step: Step) -> dict[str, Any]:
        value = self._render(step.data)
        if not value:
            raw = secrets.token_bytes(step.length)
            match step.encoding:
                case "hex":
                    value = raw.hex()
                case "base64":
                    value = base64.b64encode(raw).decode()
                case "base64safe":
                    value = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
                case "uuid":
                    value = str(uuid.uuid4())
                case other:
                    raise BootstrapError(f"unknown encoding {other!r}")
        data = {"data": value}
        self.restore(step, data)
        return data

    async def gen_tls_cert(self, step: Step) -> dict[str, Any]:
        ca, cert, key = self._render(step.ca_cert), self._render(step.cert), self._render(step.key)
        if ca and cert and key:
            return {"ca_cert": ca, "cert": cert, "pin": pin_of(cert), "key": key}
        return dict(site_certificate([self._render(host) for host in step.hosts]))

    # Waiting.

    async def wait(self, step: Step) -> None:
        url, host = self._render(step.url), self._render(step.host)
        split = urlsplit(url)
        last = "no answer yet"
        async for _ in attempts(EVERY, SERVICE_WAIT):
            if split.scheme == "tcp":
                if await self._cluster.reachable((split.hostname or "").split(".")[0], SERVICE_WAIT):
                    return
                continue
            try:
                status = await self._status_of(url, host)
            except (Unreachable, TimeoutError) as error:
                last = str(error)
                continue
            if status == step.status:
                return
            last = f"status {status}"
        raise BootstrapError(f"{url} did not answer {step.status} in time: {last}")

    async def _status_of(self, url: str, host: str) -> int:
        http, path = await self._cluster.client_of(url, SERVICE_WAIT, host_header=host)
        async with http:
            try:
                await http.call("GET", path, timeout=5.0)
                return 200
            except Unreachable:
                raise
            except ApiError as error:
                return int(error.status)

    async def status_check(self, step: Step) -> dict[str, Any]:
        last = ""
        async for _ in attempts(EVERY, timedelta(seconds=step.timeout)):
            http, path = await self._cluster.client_of(self._render(step.url), SERVICE_WAIT)
            async with http:
                try:
                    await http.call("GET", path, timeout=10.0)
                    return {"message": "all services are healthy"}
                except ApiError as error:
                    last = unhealthy_services(str(error.message))
        raise BootstrapError(f"the cluster is not healthy: {last}")

    async def log(self, step: Step) -> dict[str, Any]:
        return {"message": self._render(step.output)}

    # Apps.

    async def run_app(self, step: Step) -> dict[str, Any]:
        if step.app_step:
            data = self._app_data(step.app_step)
            data = replace(data, processes=capped(step.processes, singleton=self._singleton))
            intent = self._record.intend(step.id, {"jobs": {}})
        else:
            data, intent = await self._new_app(step)
        jobs: dict[str, Any] = intent["jobs"]  # changed in place: it is part of the record
        for process_type, count in data.processes.items():
            hosts = list(self._cluster.hosts)
            random.shuffle(hosts)
            if data.release.processes[process_type].omni:
                targets = hosts
            else:
                targets = [hosts[number % len(hosts)] for number in range(count)]
            for number, host in enumerate(targets):
                await self._start(data, process_type, host, f"{process_type}.{number}", jobs)
        return dict(builtins(data))

    async def _new_app(self, step: Step) -> tuple[AppData, dict[str, Any]]:
        if not step.artifacts:
            raise BootstrapError("bootstrap: artifacts must be set")
        if step.release is None or step.app is None:
            raise BootstrapError("bootstrap: release must be set")
        intent = self._record.intend(
            step.id,
            {"app": str(uuid.uuid4()), "release": str(uuid.uuid4()), "resources": {}, "jobs": {}}
            | {"artifacts": [str(uuid.uuid4()) for _ in step.artifacts]},
        )
        resources = [await self._provision(spec, intent) for spec in step.resources]
        env = render_environment(step.release.env, self._scope)
        for resource in resources:
            env |= resource.env
        processes = {
            name: with_legacy_defaults(replace(process, env=render_environment(process.env, self._scope)))
            for name, process in step.release.processes.items()
        }
        artifacts = [replace(a, id=i) for a, i in zip(step.artifacts, intent["artifacts"], strict=True)]
        release = replace(
            step.release, id=intent["release"], app_id=intent["app"], env=env, processes=processes,
            artifacts=[artifact.id for artifact in artifacts],
        )  # fmt: skip
        counts = capped(step.processes, singleton=self._singleton)
        data = AppData(
            app=replace(step.app, id=intent["app"]),
            release=release,
            artifacts=artifacts,
            processes=counts,
            resources=resources,
            providers=step.resources,
        )
        return data, intent

    async def _provision(self, spec: ResourceSpec, intent: dict[str, Any]) -> Resource:
        known = intent["resources"].get(spec.name)
        if known is None:
            http, path = await self._cluster.client_of(spec.url, SERVICE_WAIT)
            async with http:
                provisioned = await http.post(path, {}, answer=Provisioned)
            known = {"id": str(uuid.uuid4()), "external_id": provisioned.id, "env": provisioned.env}
            intent["resources"][spec.name] = known
            self._record.save()
        return convert(known, Resource)

    async def _start(self, data: AppData, process_type: str, host: Host, slot: str, jobs: dict[str, Any]) -> None:
        """Start one job, unless an earlier run of this step has."""
        process = data.release.processes[process_type]
        intended = jobs.get(slot)
        if intended is not None:
            known = await host.client.jobs()
            state = known.get(intended["id"])
            if state is not None and not state.status.down:
                return
        volumes = []
        for request in process.volumes:
            volume_id = (intended or {}).get("volumes", {}).get(request.path)
            if volume_id is None:
                meta = {
                    "flynn-controller.app": data.app.id,
                    "flynn-controller.release": data.release.id,
                    "flynn-controller.type": process_type,
                    "flynn-controller.path": request.path,
                    "flynn-controller.delete_on_stop": str(request.delete_on_stop).lower(),
                }
                volume_id = (await host.client.create_volume(VolumeRequest(meta=meta))).id
            volumes.append(
                VolumeBinding(
                    target=request.path, volume=volume_id, writeable=True, delete_on_stop=request.delete_on_stop
                )
            )
        job = formation_job(
            data.app, data.release, data.artifacts, process_type,
            host_id=host.id, uuid=str(uuid.uuid4()), volumes=volumes,
        )  # fmt: skip
        jobs[slot] = {"id": job.id, "volumes": {volume.target: volume.volume for volume in volumes}}
        self._record.save()
        async with host.client.following(job.id) as events:
            await host.client.add_job(job)
            try:
                async with asyncio.timeout(self._limits.job.total_seconds()):
                    async for event in events:
                        if event.event is JobEventKind.START:
                            return
                        if event.event in (JobEventKind.ERROR, JobEventKind.STOP):
                            ended = event.job
                            reason = ended.error if ended and ended.error else ""
                            if ended is not None and ended.status is not JobStatus.FAILED and not reason:
                                reason = f"exited with status {ended.exit_status}"
                            raise BootstrapError(f"job {job.id} ({data.app.name} {process_type}) failed: {reason}")
            except TimeoutError:
                seconds = self._limits.job.total_seconds()
                raise BootstrapError(
                    f"job {job.id} ({data.app.name} {process_type}) did not start within {seconds:.0f} seconds; "
                    f"see: flynn-host log {job.id}"
                ) from None

    async def add_app(self, step: Step) -> dict[str, Any]:
        """Register an app that already runs, under the ids that it runs with."""
        data = self._app_data(step.from_step)
        controller = await self._cluster.controller()
        await _ensured(lambda: controller.app(data.app.id), lambda: controller.create_app(data.app))
        for artifact in data.artifacts:
            await controller.create_artifact(artifact)
        await _ensured(lambda: controller.release(data.release.id), lambda: controller.create_release(data.release))
        for spec, resource in zip(data.providers, data.resources, strict=True):
            provider = await self._provider(spec)
            try:
                await controller.put_resource(replace(resource, provider=provider.id, apps=[data.app.id]))
            except ObjectExists:
                pass
        await controller.put_formation(Formation(app=data.app.id, release=data.release.id, processes=data.processes))
        await controller.set_app_release(data.app.id, data.release.id)
        return dict(builtins(data))

    async def deploy_app(self, step: Step) -> dict[str, Any]:
        if step.app is None or step.release is None:
            raise BootstrapError(f"step {step.id}: app and release must be set")
        controller = await self._cluster.controller()
        intent = self._record.intend(
            step.id,
            {"app": str(uuid.uuid4()), "release": str(uuid.uuid4()), "resources": {}}
            | {"artifacts": [str(uuid.uuid4()) for _ in step.artifacts]},
        )
        wanted = replace(step.app, id=intent["app"])
        app = await _ensured(lambda: controller.app(wanted.id), lambda: controller.create_app(wanted))
        artifacts = []
        for artifact, identifier in zip(step.artifacts, intent["artifacts"], strict=True):
            artifacts.append(await controller.create_artifact(replace(artifact, id=identifier)))
        env = render_environment(step.release.env, self._scope)
        processes = {
            name: with_legacy_defaults(replace(process, env=render_environment(process.env, self._scope)))
            for name, process in step.release.processes.items()
        }
        release = replace(
            step.release, id=intent["release"], app_id=app.id, env=env, processes=processes,
            artifacts=[artifact.id for artifact in artifacts],
        )  # fmt: skip
        planned = release
        release = await _ensured(lambda: controller.release(planned.id), lambda: controller.create_release(planned))
        counts = capped(step.processes, singleton=self._singleton)
        if counts:
            try:
                await controller.scale(app.id, release.id, counts, timeout=SCALE_WAIT)
            except ScaleFailed as error:
                raise BootstrapError(f"{app.name}: {error}; see: flynn-host ps -a") from error
        await controller.set_app_release(app.id, release.id)
        return dict(builtins(AppData(app=app, release=release, artifacts=artifacts, processes=counts)))

    async def scale_app(self, step: Step) -> None:
        data = self._app_data(step.app_step)
        controller = await self._cluster.controller()
        counts = capped(step.processes, singleton=self._singleton)
        await controller.put_formation(Formation(app=data.app.id, release=data.release.id, processes=counts))

    async def create_artifact(self, step: Step) -> dict[str, Any]:
        if step.artifact is None:
            raise BootstrapError(f"step {step.id}: artifact must be set")
        controller = await self._cluster.controller()
        return dict(builtins(await controller.create_artifact(step.artifact)))

    async def add_provider(self, step: Step) -> None:
        await self._provider(ResourceSpec(name=step.name, url=step.url))

    async def _provider(self, spec: ResourceSpec) -> Provider:
        controller = await self._cluster.controller()
        for provider in await controller.providers():
            if provider.name == spec.name:
                return provider
        return await controller.create_provider(Provider(name=spec.name, url=spec.url))

    async def add_route(self, step: Step) -> dict[str, Any]:
        if step.route is None:
            raise BootstrapError(f"step {step.id}: route must be set")
        controller = await self._cluster.controller()
        app = self._app_data(step.app_step).app
        route = replace(step.route, domain=self._render(step.route.domain))
        if step.cert_step:
            cert = self._record.data()[step.cert_step]
            route = replace(route, certificate=Certificate(cert=cert["cert"], key=cert["key"]))
        last: ApiError | None = None
        async for _ in attempts(EVERY, ROUTE_WAIT):
            try:
                created = await controller.create_route(app.id, route)
                return {"app": app.id, "route": created.id}
            except Conflict:
                for known in await controller.app_routes(app.id):
                    if known.domain == route.domain:
                        return {"app": app.id, "route": known.id}
                raise
            except Unreachable as error:
                last = error
        assert last is not None
        raise last

    def _app_data(self, step: str) -> AppData:
        data = self._record.data().get(step)
        if data is None:
            raise BootstrapError(f"step {step!r} has not been run")
        return convert(data, AppData)


ACTIONS: dict[str, Callable[[Actions, Step], Awaitable[dict[str, Any] | None]]] = {
    "require-env": Actions.require_env,
    "resource-check": Actions.resource_check,
    "run-app": Actions.run_app,
    "wait-hosts": Actions.wait_hosts,
    "gen-random": Actions.gen_random,
    "gen-tls-cert": Actions.gen_tls_cert,
    "wait": Actions.wait,
    "add-app": Actions.add_app,
    "deploy-app": Actions.deploy_app,
    "scale-app": Actions.scale_app,
    "create-artifact": Actions.create_artifact,
    "add-provider": Actions.add_provider,
    "add-route": Actions.add_route,
    "status-check": Actions.status_check,
    "cluster-monitor": Actions.cluster_monitor,
    "log": Actions.log,
}


async def _ensured(fetch: Callable[[], Awaitable[T]], create: Callable[[], Awaitable[T]]) -> T:
    """What an earlier run of this step made, or what is made now."""
    try:
        return await fetch()
    except NotFound:
        return await create()


def unhealthy_services(document: str) -> str:
    """The names of the unhealthy services in a status document, or the text itself if it is none."""
    try:
        detail = decode(document, dict[str, Any])["data"]["detail"]
        return ", ".join(sorted(name for name, status in detail.items() if status.get("status") != "healthy"))
    except (ApiError, KeyError, TypeError, AttributeError):
        return document[:200]
