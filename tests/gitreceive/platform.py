"""The rest of the platform as gitreceive meets it: a controller, a host and a directory with just enough in them.

All speak their real APIs over TLS with the real certificates. The host runs the real build program as a process of this
machine; the controller keeps apps and releases in memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flynn.blobstore.client import Blobstore
from flynn.host import attach
from flynn.http.server import Api, EventStream, Request
from flynn.identity import ANYONE, INSIDERS, access
from flynn.types.app import App
from flynn.types.artifact import Artifact, ImageManifest
from flynn.types.codec import builtins, replace
from flynn.types.deployment import Deployment, DeploymentEvent
from flynn.types.errors import NotFound
from flynn.types.event import Event
from flynn.types.formation import Formation, ScaleRequest
from flynn.types.host import ActiveJob, AttachReq, HostJob, HostStatus, JobStatus
from flynn.types.instance import Instance
from flynn.types.job import Job
from flynn.types.release import Release
from flynn.types.volume import VolumeInfo

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Controller:
    """Apps and releases in memory; deployments succeed or fail as told."""

    apps: dict[str, App] = field(default_factory=dict)
    releases: dict[str, Release] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    formations: dict[tuple[str, str], Formation] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    deployment_error: str = ""
    first_job_state: str = "up"
    deploys: list[str] = field(default_factory=list)

    def api(self) -> Api:
        api = Api("controller")
        for method, path, handler in (
            ("GET", "/apps/{app}", self._app),
            ("GET", "/apps/{app}/release", self._app_release),
            ("GET", "/apps/{app}/formations/{release}", self._formation),
            ("DELETE", "/apps/{app}/formations/{release}", self._delete_formation),
            ("PUT", "/apps/{app}/scale/{release}", self._scale),
            ("POST", "/apps/{app}/deploy", self._deploy),
            ("GET", "/deployments/{id}", self._deployment),
            ("GET", "/artifacts/{id}", self._artifact),
            ("POST", "/artifacts", self._create_artifact),
            ("POST", "/releases", self._create_release),
            ("GET", "/events", self._events),
        ):
            api.route(method, path, handler, allow=INSIDERS)
        return api

    def current(self, app: str) -> Release:
        return self.releases[self.apps[app].release]

    def add_app(self, name: str) -> App:
        app = App(id=f"00000000-0000-4000-8000-{len(self.apps):012d}", name=name, deploy_timeout=20)
        self.apps[name] = app
        return app

    def _find(self, name: str) -> App:
        for app in self.apps.values():
            if name in (app.name, app.id):
                return app
        raise NotFound("no such app")

    async def _app(self, request: Request) -> App:
        return self._find(request.path("app"))

    async def _app_release(self, request: Request) -> Release:
        app = self._find(request.path("app"))
        if not app.release:
            raise NotFound("no release")
        return self.releases[app.release]

    async def _formation(self, request: Request) -> Formation:
        try:
            return self.formations[self._find(request.path("app")).id, request.path("release")]
        except KeyError:
            raise NotFound("no formation") from None

    async def _delete_formation(self, request: Request) -> None:
        self.formations.pop((self._find(request.path("app")).id, request.path("release")), None)

    def _event(self, app: App, kind: str, object_id: str, data: object) -> None:
        event = Event(id=len(self.events) + 1, app=app.id, object_type=kind, object_id=object_id, data=builtins(data))
        self.events.append(event)

    async def _scale(self, request: Request) -> ScaleRequest:
        app, release = self._find(request.path("app")), request.path("release")
        wanted = replace(await request.body(ScaleRequest), id="scale-1")
        self.formations[app.id, release] = Formation(app=app.id, release=release, processes=wanted.new_processes)
        self._event(app, "job", "job-1", Job(uuid="job-1", release=release, type="web", state=self.first_job_state))
        self._event(app, "scale_request", wanted.id, replace(wanted, state="complete"))
        return wanted

    async def _deploy(self, request: Request) -> Deployment:
        app = self._find(request.path("app"))
        release = (await request.body(Release)).id
        deployment = Deployment(id=f"deployment-{len(self.deploys)}", app=app.id, new_release=release)
        self.deploys.append(release)
        if self.deployment_error:
            progress = DeploymentEvent(deployment=deployment.id, status="failed", error=self.deployment_error)
        else:
            progress = DeploymentEvent(deployment=deployment.id, status="complete")
            if app.release and (old := self.formations.pop((app.id, app.release), None)):
                self.formations[app.id, release] = replace(old, release=release)
            self.apps[app.name] = replace(app, release=release)
        self._event(app, "deployment", deployment.id, progress)
        return deployment

    async def _deployment(self, request: Request) -> Deployment:
        return Deployment(id=request.path("id"))

    async def _artifact(self, request: Request) -> Artifact:
        if request.path("id") in ("builder", "runner"):
            return Artifact(id=request.path("id"), type="flynn", manifest=ImageManifest().document())
        return self.artifacts[request.path("id")]

    async def _create_artifact(self, request: Request) -> Artifact:
        artifact = await request.body(Artifact)
        for known in self.artifacts.values():
            if known.uri == artifact.uri:
                return known
        self.artifacts[artifact.id] = artifact
        return artifact

    async def _create_release(self, request: Request) -> Release:
        release = replace(await request.body(Release), id=f"release-{len(self.releases)}")
        self.releases[release.id] = release
        return release

    async def _events(self, request: Request) -> EventStream | list[Event]:
        wanted = [kind for kind in request.query("object_types").split(",") if kind]

        def matching(after: int) -> list[Event]:
            return [
                event
                for event in self.events
                if event.id > after
                and (not wanted or event.object_type in wanted)
                and request.query("object_id") in ("", event.object_id)
            ]

        if not request.accepts_events:
            return matching(0)[: -int(request.query("count", "1000")) - 1 : -1]
        start = int(request.header("Last-Event-Id") or 0)

        async def stream() -> AsyncIterator[Event]:
            last = start
            while True:
                for event in matching(last):
                    last = event.id
                    yield event
                await asyncio.sleep(0.02)

        return EventStream(stream())


@dataclass
class Host:
    """Runs build jobs as processes of this machine."""

    directory: Path
    jobs: dict[str, HostJob] = field(default_factory=dict)
    children: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    waiting: dict[str, asyncio.Future[asyncio.subprocess.Process]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    volumes: int = 0
    before_exit: Callable[[HostJob], Awaitable[None]] | None = None

    def api(self) -> Api:
        api = Api("flynn-host")
        makers = access("app:gitreceive")
        api.route("GET", "/host/status", self._status, allow=makers)
        api.route("POST", "/storage/providers/default/volumes", self._volume, allow=makers)
        api.route("GET", "/host/jobs", self._list, allow=makers)
        api.route("PUT", "/host/jobs/{id}", self._add, allow=makers)
        api.route("DELETE", "/host/jobs/{id}", self._stop, allow=makers)
        api.route("POST", "/attach", self._attach, allow=makers)
        return api

    async def _status(self, request: Request) -> HostStatus:
        return HostStatus(id="host1")

    async def _volume(self, request: Request) -> VolumeInfo:
        self.volumes += 1
        return VolumeInfo(id=f"volume-{self.volumes}")

    async def _add(self, request: Request) -> None:
        job = await request.body(HostJob)
        self.jobs[job.id] = job
        place = self.directory / job.id
        place.mkdir()
        child = await asyncio.create_subprocess_exec(
            *("/usr/bin/python3", "-m", "flynn.slugbuilder.main"),
            env={
                "PATH": os.environ["PATH"],
                **job.config.env,
                "PYTHONPATH": str(REPOSITORY),
                "TMPDIR": str(place),
                "APP_LINK": str(place / "link"),
                "BUILDPACKS_DIR": str(REPOSITORY / "buildpacks"),
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self.children[job.id] = child
        self.waiting[job.id].set_result(child)

    async def _list(self, request: Request) -> dict[str, ActiveJob]:
        running = (id for id, child in self.children.items() if child.returncode is None)
        return {id: ActiveJob(job=self.jobs[id], status=JobStatus.RUNNING) for id in running}

    async def _stop(self, request: Request) -> None:
        job = request.path("id")
        self.stopped.append(job)
        with suppress(ProcessLookupError):
            os.killpg(self.children[job].pid, signal.SIGKILL)
        await self.children[job].wait()

    async def end(self) -> None:
        """Leave no job behind."""
        for child in self.children.values():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()

    async def _attach(self, request: Request) -> None:
        wanted = await request.body(AttachReq)
        connection = await request.upgrade(attach.PROTOCOL)
        self.waiting[wanted.job_id] = asyncio.get_running_loop().create_future()
        connection.write(attach.encode(attach.Waiting()))
        child = await self.waiting[wanted.job_id]
        connection.write(attach.encode(attach.Attached()))

        async def copy(source: asyncio.StreamReader, stream: attach.Stream) -> None:
            while data := await source.read(65536):
                connection.write(attach.encode(attach.Data(stream, data)))
                await connection.drain()

        async def feed() -> None:
            assert child.stdin is not None
            with suppress(ConnectionError):
                while isinstance(frame := await attach.read_client_frame(connection), attach.Data) and frame.data:
                    child.stdin.write(frame.data)
                    await child.stdin.drain()
            child.stdin.close()

        feeding = asyncio.ensure_future(feed())
        assert child.stdout is not None and child.stderr is not None
        with suppress(ConnectionError):
            await asyncio.gather(copy(child.stdout, attach.Stream.STDOUT), copy(child.stderr, attach.Stream.STDERR))
            status = await child.wait()
            if self.before_exit is not None:
                await self.before_exit(self.jobs[wanted.job_id])
            connection.write(attach.encode(attach.Exit(status)))
            await connection.drain()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def directory_api(instances: dict[str, list[Instance]], refused: set[str]) -> Api:
    """discoverd, as far as clients ask here; it lists no instance whose id is in `refused`."""

    async def get(request: Request) -> list[Instance]:
        return instances.get(request.path("service"), [])

    async def put(request: Request) -> None:
        given, listed = await request.body(Instance), instances.setdefault(request.path("service"), [])
        if given.id not in refused and all(known.id != given.id for known in listed):
            listed.append(given)

    async def delete(request: Request) -> None:
        return

    api = Api("discoverd")
    api.route("GET", "/services/{service}/instances", get, allow=ANYONE)
    api.route("PUT", "/services/{service}/instances/{id}", put, allow=ANYONE)
    api.route("DELETE", "/services/{service}/instances/{id}", delete, allow=ANYONE)
    return api


@dataclass
class Other:
    """Another gitreceive; `leave` takes it out of the directory, `kill` ends it and all its children."""

    url: str
    leave: Callable[[], None]
    kill: Callable[[], None]


@dataclass
class Platform:
    """Everything, running; `url` is where git pushes to."""

    controller: Controller
    host: Host
    blobs: Blobstore
    url: str
    ca: Path
    key: str
    directory: Path
    environment: dict[str, str]  # of gitreceive
    instances: dict[str, list[Instance]]  # what the directory lists
    refused: set[str]  # ids of instances that it does not list any more
    builds: int = 0

    def add_app(self, name: str) -> App:
        return self.controller.add_app(name)

    @asynccontextmanager
    async def another_gitreceive(self, job_id: str) -> AsyncIterator[Other]:
        """A second gitreceive, in a process of its own."""
        known = list(self.instances["gitreceive"])
        child = await asyncio.create_subprocess_exec(
            *("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
            *(sys.executable, "-c", "from flynn.gitreceive.main import main; main()"),
            env={**self.environment, "PORT": str(free_port()), "FLYNN_JOB_ID": job_id, "PYTHONPATH": str(REPOSITORY)},
        )
        try:
            async with asyncio.timeout(30):
                while len(self.instances["gitreceive"]) == len(known):
                    await asyncio.sleep(0.05)
            (added,) = [instance for instance in self.instances["gitreceive"] if instance not in known]

            def leave() -> None:
                self.refused.add(added.id)
                self.instances["gitreceive"].remove(added)

            yield Other(f"https://{added.addr}", leave, child.kill)
        finally:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    def remote(self, app: str, key: str | None = None, url: str = "") -> str:
        return (url or self.url).replace("https://", f"https://user:{key or self.key}@") + f"/{app}.git"

    @asynccontextmanager
    async def pushing(
        self, repository: Path, app: str, *refs: str, key: str | None = None, url: str = ""
    ) -> AsyncIterator[Push]:
        """A `git push` that runs while the block does."""
        child = await asyncio.create_subprocess_exec(
            *("git", "-C", str(repository), "push", self.remote(app, key, url), *(refs or ("master",))),
            env=self.git_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Push(child)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()

    async def push(self, repository: Path, app: str, *refs: str, key: str | None = None) -> tuple[int, str]:
        async with self.pushing(repository, app, *refs, key=key) as push:
            return await push.end()

    def git_environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "GIT_SSL_CAINFO": str(self.ca),
            "GIT_SSL_CERT": str(self.directory / "router" / "cert.pem"),
            "GIT_SSL_KEY": str(self.directory / "router" / "key.pem"),
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }

    async def git(self, repository: Path, *arguments: str) -> str:
        child = await asyncio.create_subprocess_exec(
            *("git", "-C", str(repository), *arguments),
            env=self.git_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await child.communicate()
        assert child.returncode == 0, output
        return output.decode().strip()

    async def repository(self, name: str, **files: str) -> Path:
        path = self.directory / name
        path.mkdir()
        await self.git(path, "init", "--quiet", "--initial-branch=master")
        await self.commit(path, **files)
        return path

    async def commit(self, path: Path, **files: str) -> str:
        for file, content in files.items():
            target = path / file.replace("__", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
        await self.git(path, "add", "--all")
        await self.git(path, "commit", "--quiet", "--allow-empty", "--message=x")
        return await self.git(path, "rev-parse", "HEAD")


@dataclass
class Push:
    child: asyncio.subprocess.Process
    seen: str = ""

    async def until(self, text: str) -> None:
        """Wait until the user has seen `text`."""
        assert self.child.stdout is not None
        async with asyncio.timeout(30):
            while text not in self.seen:
                chunk = await self.child.stdout.read(4096)
                assert chunk, f"the push ended without {text!r}: {self.seen}"
                self.seen += _plain(chunk)

    async def end(self) -> tuple[int, str]:
        """Wait for the end; the exit status and all the user has seen, without cursor movements."""
        assert self.child.stdout is not None
        async with asyncio.timeout(120):
            self.seen += _plain(await self.child.stdout.read())
            return await self.child.wait(), self.seen


def _plain(output: bytes) -> str:
    text = output.decode("utf-8", "replace")
    for sequence in ("\x1b[1G", "\x1b[K", " " * 8 + "\n"):
        text = text.replace(sequence, "\n" if sequence.endswith("\n") else "")
    return "\n".join(line.rstrip() for line in text.split("\n"))
