"""Git over smart HTTP: git-http-backend(1)'s three requests, and what surrounds a push.

See spec/build-pipeline.md section 2.

A push holds its app's lease from before its repository is fetched until after it is saved, so pushes of one app follow
one another and none loses the other's commits. Git's own report of success is held back until the repository is saved.
Failures after the headers are told in git's own terms (the fatal channel), never by cutting the connection.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from flynn.gitreceive import pktline, process
from flynn.gitreceive.lease import Lease, Leases
from flynn.gitreceive.matching import Advertise, Exchange, Service, match
from flynn.gitreceive.repository import Broken, Repositories, Repository, refs_of
from flynn.gitreceive.strays import Strays
from flynn.http.server import Api, Raw, Request, Streaming
from flynn.identity import access
from flynn.types.app import App
from flynn.types.errors import ApiError, NotFound, PreconditionFailed

log = logging.getLogger(__name__)

CALLERS = access("operator", "host", "app:router", "outside")
NO_CACHE = {"Cache-Control": "no-cache"}
TEXT = "text/plain; charset=utf-8"
HEAD_BYTES = 64 << 10  # where the capabilities of a push are looked for
LEASE_SECONDS = 3600.0

UNAUTHORIZED = Raw("Authentication required\n", TEXT, 401, {"WWW-Authenticate": "Basic"})
FORBIDDEN = Raw("Forbidden\n", TEXT, 403)
NOT_FOUND = Raw("Not Found\n", TEXT, 404)
UNKNOWN_APP = Raw("unknown app\n", TEXT, 404)
BROKEN = Raw("Internal server error\n", TEXT, 500)


class Apps(Protocol):
    """What is needed of the controller."""

    async def app(self, app: str) -> App:
        """Return one app by name or id. Raises NotFound."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What requests need."""

    key: str  # the controller key, accepted as password
    apps: Apps
    repositories: Repositories
    leases: Leases
    strays: Strays
    environment: Mapping[str, str]  # of git and, through the hook, of the receiver


def gitreceive_api(surroundings: Surroundings) -> Api:
    """Return the git server."""
    handlers = _Handlers(surroundings)
    api = Api("gitreceive")
    api.route("GET", "/{path:.*}", handlers.handle, allow=CALLERS)
    api.route("POST", "/{path:.*}", handlers.handle, allow=CALLERS)
    return api


class _Handlers:
    def __init__(self, surroundings: Surroundings) -> None:
        self._ = surroundings

    async def handle(self, request: Request) -> Raw | Streaming:
        """Authenticate, find the app, and hand over."""
        fields = {"method": request.method, "path": request.raw_path, "client": request.remote, "request": request.id}
        credentials = request.basic_auth
        if credentials is None:
            return UNAUTHORIZED  # git always asks without a key first
        if not hmac.compare_digest(credentials[1].encode(), self._.key.encode()):
            log.info("refused: wrong key", extra=fields)
            return UNAUTHORIZED
        wanted = match(request.method, request.raw_path)
        if wanted is None:
            return FORBIDDEN
        try:
            app = await self._.apps.app(wanted.app)
        except NotFound:
            return UNKNOWN_APP
        except ApiError as error:
            log.error("cannot ask the controller", extra={**fields, "error": error})
            return BROKEN
        log.info("request", extra={**fields, "app": app.name})
        match wanted:
            case Advertise():
                return await self._advertise(request, app)
            case Exchange(service=Service.UPLOAD_PACK):
                return self._answer(Service.UPLOAD_PACK, self._upload_pack(request, app))
            case _:
                if request.content_length == len(pktline.FLUSH):
                    return await self._probe(request)
                return self._answer(Service.RECEIVE_PACK, self._receive_pack(request, app))

    def _answer(self, service: Service, body: AsyncIterator[bytes]) -> Streaming:
        return Streaming(body, f"application/x-{service}-result", headers=NO_CACHE)

    async def _advertise(self, request: Request, app: App) -> Raw:
        try:
            service = Service(request.query("service"))
        except ValueError:
            return NOT_FOUND
        try:
            async with self._.repositories.unpacked(app.id) as repository:
                argv = process.arguments(service, repository.path, advertise=True)
                refs = b"".join([chunk async for chunk in process.exchange(argv, _nothing(), self._environment(app))])
        except (ApiError, Broken, process.GitFailed, OSError) as error:
            log.error("cannot prepare the repository", extra={"app": app.name, "error": error})
            return BROKEN
        kind = f"application/x-{service}-advertisement"
        return Raw(pktline.advertisement(service) + refs, kind, headers=NO_CACHE)

    async def _probe(self, request: Request) -> Raw:
        """A lone flush: git asks, before it sends a large push, whether it may."""
        await request.raw()
        return Raw(b"", f"application/x-{Service.RECEIVE_PACK}-result", headers=NO_CACHE)

    async def _upload_pack(self, request: Request, app: App) -> AsyncGenerator[bytes, None]:
        try:
            async with self._.repositories.unpacked(app.id) as repository:
                argv = process.arguments(Service.UPLOAD_PACK, repository.path)
                async with aclosing(process.exchange(argv, request.chunks(), self._environment(app))) as answer:  # type: ignore[type-var]  # an async generator
                    async for chunk in answer:
                        yield chunk
        except process.GitFailed as error:
            log.warning("a fetch failed", extra={"app": app.name, "error": error})
        except (ApiError, Broken) as error:
            log.error("cannot prepare the repository", extra={"app": app.name, "error": error})
            yield pktline.packet(b"ERR the repository cannot be read, see the log of gitreceive\n")

    async def _receive_pack(self, request: Request, app: App) -> AsyncGenerator[bytes, None]:
        """Yield the answer to a push."""
        body = request.chunks()
        head = await _head(body)
        side_band = pktline.asks_for_side_band(head)
        began = time.monotonic()
        try:
            lease = await self._.leases.try_acquire(app.id)
            if lease is None:
                if side_band:
                    yield pktline.progress("-----> Another push of this app is running, waiting for it to finish...")
                async with asyncio.timeout(LEASE_SECONDS):
                    lease = await self._.leases.acquire(app.id)
            async with lease.kept(), self._.repositories.unpacked(app.id) as repository:
                if lease.taken_over:
                    await self._.strays.stop(app.id, lease.token)
                async with aclosing(self._push(app, lease, repository, _joined(head, body), side_band)) as answer:
                    async for chunk in answer:
                        yield chunk
            log.info("push done", extra={"app": app.name, "seconds": round(time.monotonic() - began, 1)})
        except TimeoutError:
            yield _failure(side_band, "another push of this app has been running for too long")
        except (ApiError, Broken) as error:
            log.error("cannot prepare the repository", extra={"app": app.name, "error": error})
            yield _failure(side_band, "the repository cannot be read, see the log of gitreceive")

    async def _push(
        self, app: App, lease: Lease, repository: Repository, body: AsyncIterator[bytes], side_band: bool
    ) -> AsyncGenerator[bytes, None]:
        before = await refs_of(repository)
        holder = pktline.ReportHolder(side_band)
        argv = process.arguments(Service.RECEIVE_PACK, repository.path)
        try:
            environment = {**self._environment(app), "RECEIVE_LEASE": lease.token}
            async with aclosing(process.exchange(argv, body, environment)) as answer:  # type: ignore[type-var]  # an async generator
                async for chunk in answer:
                    if passed := holder.feed(chunk):
                        yield passed
        except (process.GitFailed, pktline.Malformed) as error:
            log.warning("a push failed", extra={"app": app.name, "error": error})
            yield holder.rest() or _failure(side_band, "git ended unexpectedly")
            return
        if await refs_of(repository) != before:
            try:
                await self._.repositories.save(repository)
            except (ApiError, Broken) as error:
                log.error("a push was not saved", extra={"app": app.name, "error": error})
                reason = "another push was faster" if isinstance(error, PreconditionFailed) else "the blobstore failed"
                yield _failure(
                    side_band, f"the app is deployed, but its repository was not saved: {reason}. Push again."
                )
                return
        yield holder.rest()

    def _environment(self, app: App) -> dict[str, str]:
        return {**self._.environment, "RECEIVE_APP": app.id}


def _failure(side_band: bool, text: str) -> bytes:
    """The end of an answer that has already begun; without a side band there is only the short form."""
    return (pktline.fatal(text) if side_band else pktline.packet(f"ERR {text}\n".encode())) + pktline.FLUSH


async def _head(body: AsyncIterator[bytes]) -> bytes:
    """The beginning of the body, long enough to hold the capabilities."""
    head = b""
    async for chunk in body:
        head += chunk
        # The NUL may be there before the capabilities behind it are; the packet tells its length.
        if len(head) >= HEAD_BYTES or (b"\0" in head and _first_packet_is_complete(head)):
            break
    return head


def _first_packet_is_complete(head: bytes) -> bool:
    try:
        return len(head) >= int(head[:4], 16)
    except ValueError:
        return True


async def _joined(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for chunk in rest:
        yield chunk


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
