"""flynn-receiver: one build and deployment, from a tar of source code on standard input.

    flynn-receiver <app> <revision> [--env NAME=value]... [--meta key=value]...

Started by the pre-receive hook of a push; also usable by hand. Progress goes to standard output, the one line that says
why it failed to standard error. Exit status 0 only when the app is deployed. SIGTERM stops the build job and ends with
status 1. spec/build-pipeline.md section 3.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from flynn.aio.clock import Clock, SystemClock
from flynn.blobstore import client as blobstore
from flynn.blobstore.client import Blobstore
from flynn.controller import client as controller
from flynn.controller.client import Controller, DeploymentFailed, ScaleFailed
from flynn.discoverd.client import Discoverd
from flynn.gitreceive import buildjob
from flynn.gitreceive.release import (
    Built,
    CannotBuild,
    Stack,
    build_resources,
    choose_stack,
    next_release,
    overlaid_env,
    parse_pairs,
    slug_artifact,
    slug_manifest,
)
from flynn.gitreceive.strays import HOST_SERVICE
from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import decode
from flynn.types.errors import ApiError, NotFound, PreconditionFailed
from flynn.types.job import Job, JobState
from flynn.types.release import Release

T = TypeVar("T")

READ_BYTES = 64 << 10
DEPLOY_TIMEOUT_SECONDS = 120  # of an app that has none set
MAX_RESULT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Push:
    """What is to be built."""

    app: str  # name or id
    revision: str
    env: Mapping[str, str]
    meta: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Config:
    """Where things are, from gitreceive's environment."""

    environ: Mapping[str, str]
    controller_key: str  # CONTROLLER_KEY
    controller_url: str  # CONTROLLER_URL
    signing_key: str  # BLOBSTORE_SIGNING_KEY
    blobstore_url: str  # BLOBSTORE_URL

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        for name in ("CONTROLLER_KEY", "BLOBSTORE_SIGNING_KEY"):
            if not environ.get(name):
                raise CannotBuild(f"{name} is not set")
        return cls(
            environ=environ,
            controller_key=environ["CONTROLLER_KEY"],
            controller_url=environ.get("CONTROLLER_URL") or controller.INSIDE_URL,
            signing_key=environ["BLOBSTORE_SIGNING_KEY"],
            blobstore_url=environ.get("BLOBSTORE_URL") or blobstore.LEADER_URL,
        )


class InitialJobFailed(Exception):
    """The first job of a new app ended before it was up."""


class Receiver:
    """The procedure of one push; its neighbours are handed in."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        apps: Controller,
        blobs: Blobstore,
        registry: Discoverd,
        clock: Clock,
    ) -> None:
        self._config = config
        self._identity = identity
        self._apps = apps
        self._blobs = blobs
        self._registry = registry
        self._clock = clock

    async def receive(self, push: Push, source: AsyncIterator[bytes]) -> None:
        """Build, release, deploy, and scale a first release. Raises CannotBuild."""
        app = await self._app(push.app)
        previous = await self._previous(app)
        stack = choose_stack((previous.env if previous else {}).get("FLYNN_STACK", ""), self._config.environ)
        for warning in stack.warnings:
            say(warning)
        builder = await _told("Error getting slugbuilder image", self._apps.artifact(stack.builder))
        await _told("Error getting slugrunner image", self._apps.artifact(stack.runner))
        say(f"-----> Building {app.name}...")
        slug, types = await self._build(push, app, previous, stack, builder, source)
        say("-----> Creating release...")
        wanted = next_release(
            app, previous, artifacts=[stack.runner, slug.id], types=types, env=push.env, meta=push.meta, stack=stack
        )
        release = await _told("Error creating release", self._apps.create_release(wanted))
        first = "web" in release.processes and not await self._was_scaled(app, previous)
        try:
            await self._apps.deploy(app.id, release.id)
        except (ApiError, DeploymentFailed) as error:
            raise CannotBuild(f"Error deploying app release: {error}") from error
        if first:
            await self._scale_first(app, release)
        say("=====> Application deployed")

    async def _app(self, name: str) -> App:
        try:
            return await _told("Error retrieving app", self._apps.app(name))
        except CannotBuild as error:
            if isinstance(error.__cause__, NotFound):
                raise CannotBuild(f'Unknown app "{name}"') from error
            raise

    async def _previous(self, app: App) -> Release | None:
        try:
            return await self._apps.app_release(app.id)
        except NotFound:
            return None
        except ApiError as error:
            raise CannotBuild(f"Error getting current app release: {error}") from error

    async def _build(
        self,
        push: Push,
        app: App,
        previous: Release | None,
        stack: Stack,
        builder: Artifact,
        source: AsyncIterator[bytes],
    ) -> tuple[Artifact, list[str]]:
        """Run the build job and return its slug as an artifact, with the process types."""
        env = overlaid_env(previous, push.env)
        blobs = buildjob.Blobs.of(app, str(uuid.uuid4()))
        environment = buildjob.build_environment(
            blobs,
            stack=stack,
            revision=push.revision,
            app_env=env,
            environ=self._config.environ,
            blobstore_url=self._config.blobstore_url,
            ca_pem=self._identity.ca_path.read_text(),
            signing_key=self._config.signing_key,
            now=self._clock.now(),
        )
        resources = build_resources(previous, self._config.environ.get("SLUGBUILDER_DEFAULT_MEMORY_LIMIT", ""))
        try:
            async with await self._some_host() as http:
                host = HostClient(http)
                job = buildjob.build_job(
                    app,
                    previous,
                    builder,
                    host_id=(await host.status()).id,
                    uuid=str(uuid.uuid4()),
                    volume=await buildjob.create_volume(host),
                    environment=environment,
                    resources=resources,
                    push=self._config.environ.get("RECEIVE_LEASE", ""),
                )
                everything = buildjob.joined(source, buildjob.configuration_archive(env))
                status = await buildjob.run_build(
                    host, job, everything, output=sys.stdout.buffer, errors=sys.stderr.buffer
                )
        except ApiError as error:
            raise CannotBuild(f"Build failed: {error}") from error
        if status:
            raise CannotBuild(f"Build failed: exec: job exited with status {status}")
        try:
            return await self._publish(blobs)
        except ApiError as error:
            raise CannotBuild(f"Error getting slug image: {error}") from error
        finally:
            await self._discard(blobs)

    async def _some_host(self) -> HttpClient:
        instances = await self._registry.instances(HOST_SERVICE)
        if not instances:
            raise CannotBuild("Build failed: no host is up")
        address = random.choice(instances).addr
        return HttpClient(f"https://{address}", tls=self._identity, server_name=f"{HOST_SERVICE}.discoverd")

    async def _publish(self, blobs: buildjob.Blobs) -> tuple[Artifact, list[str]]:
        """Check what the job wrote against what the store measured, and give the slug the name of its content."""
        built = decode(await self._blobs.read(blobs.result, limit=MAX_RESULT_BYTES), Built)
        types = built.types()
        slug = await self._blobs.find(blobs.slug)
        if slug is None or (slug.sha512_256, slug.size) != (built.sha512_256, built.length):
            raise CannotBuild("Build failed: the slug in the blobstore is not the one the build describes")
        layer = f"/slugs/layers/{slug.sha512_256}.squashfs"
        try:
            copied = await self._blobs.copy(blobs.slug, layer, only_create=True)
        except PreconditionFailed:
            pass  # the same content has been built before
        else:
            if copied.sha512_256 != slug.sha512_256:
                await self._blobs.delete(layer)
                raise CannotBuild("Build failed: the slug was changed after the build")
        manifest = slug_manifest(built.sha512_256, built.length)
        await self._blobs.put(
            f"/slugs/images/{manifest.id()}.json", manifest.canonical(), content_type="application/json"
        )
        artifact = slug_artifact(str(uuid.uuid4()), manifest, types)
        return await self._apps.create_artifact(artifact), types

    async def _discard(self, blobs: buildjob.Blobs) -> None:
        try:
            await self._blobs.delete(blobs.slug)
            await self._blobs.delete(blobs.result)
        except ApiError:
            pass  # they are garbage, not a reason to refuse the push

    async def _was_scaled(self, app: App, previous: Release | None) -> bool:
        """Whether the app has been given counts before, be they zero."""
        if previous is None:
            return False
        try:
            await self._apps.formation(app.id, previous.id)
        except NotFound:
            return False
        except ApiError as error:
            raise CannotBuild(f"Error getting formation: {error}") from error
        return True

    async def _scale_first(self, app: App, release: Release) -> None:
        say("=====> Scaling initial release to web=1")
        say("-----> Waiting for initial web job to start...")
        started = False

        def watch(job: Job) -> None:
            nonlocal started
            if job.state == JobState.UP and not started:
                started = True
                say("=====> Initial web job started")
            if job.state in (JobState.DOWN, JobState.CRASHED, JobState.FAILED):
                raise InitialJobFailed("Initial web job failed to start")

        timeout = timedelta(seconds=app.deploy_timeout or DEPLOY_TIMEOUT_SECONDS)
        try:
            await self._apps.scale(app.id, release.id, {"web": 1}, timeout=timeout, on_job=watch)
        except (ApiError, ScaleFailed, InitialJobFailed) as error:
            say("-----> WARN: scaling initial release down to web=0 due to error")
            try:
                await self._apps.delete_formation(app.id, release.id)
            except ApiError as second:
                say(f"-----> WARN: could not scale the initial release down (it may continue to run): {second}")
            raise CannotBuild(str(error)) from error


async def _told(what: str, call: Awaitable[T]) -> T:
    """Await a call; a refusal becomes what the user reads."""
    try:
        return await call
    except ApiError as error:
        raise CannotBuild(f"{what}: {error}") from error


def say(line: str) -> None:
    """Show one line of progress."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def standard_input() -> AsyncIterator[bytes]:
    """Standard input as it arrives; a pipe or a file."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(READ_BYTES)
    try:
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    except (ValueError, OSError):  # a regular file, which never makes anybody wait
        while chunk := sys.stdin.buffer.read(READ_BYTES):
            yield chunk
        return
    while chunk := await reader.read(READ_BYTES):
        yield chunk


async def run(arguments: argparse.Namespace) -> None:
    """Connect to everybody and receive one push."""
    config = Config.from_environment(os.environ)
    push = Push(arguments.app, arguments.revision, parse_pairs(arguments.env), parse_pairs(arguments.meta))
    identity = Identity.from_environment(os.environ)
    async with (
        controller.inside(config.controller_key, identity, url=config.controller_url) as apps,
        blobstore.inside(identity, url=config.blobstore_url) as blobs,
        Discoverd.from_environment(os.environ) as registry,
    ):
        receiver = Receiver(config, identity, apps, blobs, registry, SystemClock())
        await receiver.receive(push, standard_input())


def main() -> None:
    parser = argparse.ArgumentParser(prog="flynn-receiver", description="Build and deploy the tar on standard input.")
    parser.add_argument("app", help="name or id")
    parser.add_argument("revision", help="becomes SOURCE_VERSION of the build")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("-m", "--meta", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(_until_signal(arguments)))


async def _until_signal(arguments: argparse.Namespace) -> int:
    """Run, ended by SIGTERM or SIGINT if need be; returns the exit status."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run(arguments))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        print("ERROR: cancelled", file=sys.stderr)
        return 1
    except CannotBuild as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    except (ApiError, OSError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
