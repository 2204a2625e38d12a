"""The job that builds: what a host is asked to run, and running it with the source on its standard input.

The job runs code nobody has looked at. It belongs to the user's app, has no certificate, and holds nothing but URLs
that are signed for one verb on one blob each.
"""

from __future__ import annotations

import asyncio
import io
import logging
import tarfile
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import IO

from flynn.aio.backoff import Backoff, retrying
from flynn.blobstore.client import sign
from flynn.gitreceive.release import BUILDER_TYPE, CannotBuild, Stack
from flynn.gitreceive.strays import META_PUSH
from flynn.host.attach import AttachRefused, Data, Exit, Failure, ProtocolViolation, Stream
from flynn.host.client import Attachment, HostClient
from flynn.jobspec import entrypoint, job_id, mountspecs
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.errors import ApiError
from flynn.types.host import (
    META_APP,
    META_APP_NAME,
    META_RELEASE,
    META_TYPE,
    AttachFlag,
    AttachReq,
    ContainerConfig,
    HostJob,
    VolumeBinding,
)
from flynn.types.release import Release
from flynn.types.resources import Resources
from flynn.types.volume import VolumeRequest

log = logging.getLogger(__name__)

BUILD_LIMIT = timedelta(hours=1)  # of one build; also how long its URLs are good for
ENV_DIR_COOKIE = ".ENV_DIR_bdca46b87df0537eaefe79bb632d37709ff1df18"
PARTITION = "background"

PASSED_ON = ("SSH_CLIENT_KEY", "SSH_CLIENT_HOSTS", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PASSED_ON_PREFIXES = ("PIP_", "NPM_CONFIG_")
"""What the operator sets on gitreceive for all builds."""


@dataclass(frozen=True, slots=True)
class Blobs:
    """The names of what one build reads and writes."""

    slug: str  # the build's own name for it: it moves to its content's name once it is checked
    result: str
    cache: str

    @classmethod
    def of(cls, app: App, build_id: str) -> Blobs:
        return cls(f"/slugs/builds/{build_id}.squashfs", f"/slugs/builds/{build_id}.json", f"/{app.id}-cache.tgz")


def build_environment(
    blobs: Blobs,
    *,
    stack: Stack,
    revision: str,
    app_env: Mapping[str, str],
    environ: Mapping[str, str],
    blobstore_url: str,
    ca_pem: str,
    signing_key: str,
    now: datetime,
) -> dict[str, str]:
    """Return the environment of the build job. `app_env` is the app's configuration, `environ` gitreceive's own."""

    def signed(method: str, name: str) -> str:
        return sign(signing_key, method, name, within=BUILD_LIMIT, now=now, url=blobstore_url)

    environment = {
        "SLUG_PUT_URL": signed("PUT", blobs.slug),
        "RESULT_PUT_URL": signed("PUT", blobs.result),
        "BUILD_CACHE_GET_URL": signed("GET", blobs.cache),
        "BUILD_CACHE_PUT_URL": signed("PUT", blobs.cache),
        "BUILD_SECONDS": str(int(BUILD_LIMIT.total_seconds())),
        "BLOBSTORE_CA": ca_pem,
        "SOURCE_VERSION": revision,
        "STACK": stack.name,
        "CF_STACK": stack.cf_name,
    }
    if url := app_env.get("BUILDPACK_URL"):
        environment["BUILDPACK_URL"] = url
    for name, value in environ.items():
        if value and (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)):
            environment[name] = value
    return environment


def build_job(
    app: App,
    previous: Release | None,
    builder: Artifact,
    *,
    host_id: str,
    uuid: str,
    volume: str,
    environment: Mapping[str, str],
    resources: Resources,
    push: str = "",
) -> HostJob:
    """Return what the host is asked to run. `push`: the token of the lease; empty for a build started by hand."""
    return HostJob(
        id=job_id(host_id, uuid),
        mountspecs=mountspecs([builder]),
        metadata={
            META_APP: app.id,
            META_APP_NAME: app.name,
            META_RELEASE: previous.id if previous else "",
            META_TYPE: BUILDER_TYPE,
            **({META_PUSH: push} if push else {}),
        },
        resources=resources,
        partition=PARTITION,
        config=ContainerConfig(
            args=["/builder/build.sh"],
            env={**entrypoint([builder], BUILDER_TYPE).env, **environment},
            stdin=True,
            disable_log=True,
            volumes=[VolumeBinding(target="/tmp", volume=volume, writeable=True, delete_on_stop=True)],
        ),
    )


def configuration_archive(env: Mapping[str, str]) -> bytes:
    """Return a tar with one file per variable, to be sent behind the source; empty for no variables."""
    if not env:
        return b""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, value in env.items():
            if not name or "/" in name or name in (".", ".."):
                continue  # no file can be called that, and no shell variable either
            content = value.encode("utf-8", "surrogateescape")
            member = tarfile.TarInfo(f"{ENV_DIR_COOKIE}/{name}")
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


async def run_build(
    host: HostClient, job: HostJob, source: AsyncIterable[bytes], *, output: IO[bytes], errors: IO[bytes]
) -> int:
    """Run the job with `source` as its input, show what it says, and return its exit status.

    Whatever ends this early, also a cancellation, stops the job.

    Raises:
        CannotBuild: the host could not run it.
    """
    flags = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.STDIN | AttachFlag.STREAM
    started = False
    try:
        async with asyncio.timeout(BUILD_LIMIT.total_seconds()):
            async with host.attach(AttachReq(job_id=job.id, flags=int(flags))) as attachment:
                started = True
                await host.add_job(job)
                await attachment.ready()
                status = await _converse(attachment, source, output, errors)
        started = False
        return status
    except TimeoutError:
        raise CannotBuild(f"Build failed: not done within {BUILD_LIMIT}") from None
    except (ApiError, AttachRefused, ProtocolViolation, ConnectionError) as error:
        raise CannotBuild(f"Build failed: {error}") from error
    finally:
        if started:
            await _stop(host, job.id)


async def _converse(attachment: Attachment, source: AsyncIterable[bytes], output: IO[bytes], errors: IO[bytes]) -> int:
    feeding = asyncio.ensure_future(_feed(attachment, source))
    try:
        async for frame in attachment.frames():
            match frame:
                case Data(Stream.STDERR, data):
                    _show(errors, data)
                case Data(_, data):
                    _show(output, data)
                case Exit(status):
                    return status
                case Failure(message):
                    raise AttachRefused(message)
        raise AttachRefused("the host closed the connection")
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(attachment: Attachment, source: AsyncIterable[bytes]) -> None:
    try:
        async for chunk in source:
            await attachment.send(Data(Stream.STDIN, chunk))
        await attachment.send(Data(Stream.STDIN, b""))
    except (ConnectionError, OSError) as error:
        log.debug("the build ended before it had read everything", extra={"error": error})


def _show(target: IO[bytes], data: bytes) -> None:
    target.write(data)
    target.flush()


async def _stop(host: HostClient, job: str) -> None:
    try:
        await host.stop_job(job)
    except ApiError as error:
        log.warning("could not stop the build job", extra={"job": job, "error": error})


async def create_volume(host: HostClient) -> str:
    """Return a new volume for a build's temporary files."""
    policy = Backoff(first=timedelta(milliseconds=100), factor=1)
    created = await retrying(
        lambda: host.create_volume(VolumeRequest()), on=ApiError, policy=policy, within=timedelta(seconds=5)
    )
    return created.id


async def joined(source: AsyncIterator[bytes], tail: bytes) -> AsyncIterator[bytes]:
    """The source, then `tail`."""
    async for chunk in source:
        yield chunk
    if tail:
        yield tail
