"""The HTTP server of every daemon.

An `Api` is a table of endpoints, each with a rule of access; `listen` serves it. Handlers take a `Request` and return
a value: anything the codec knows becomes JSON, `None` an empty 200, and `Raw`, `Streaming` and `EventStream` the rest.
Refusals are raised as `ApiError`; the mapping to status codes happens here and nowhere else.

Every API also answers /ping, /.well-known/status and /metrics. Unknown paths and methods are both 404, as clients of
the original expect.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import re
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler as AiohttpHandler
from aiohttp.typedefs import Middleware

from flynn.http import sse
from flynn.http.connection import BUFFER_BYTES, LastWordsReader, RawConnection, ServedConnection
from flynn.identity.access import ANYONE, INSIDERS, Access
from flynn.identity.identity import Identity
from flynn.identity.peer import Peer, PeerKind, peer_of
from flynn.types.codec import builtins, decode_first, encode, encode_indented
from flynn.types.errors import (
    ApiError,
    BadSyntax,
    BodyTooBig,
    Forbidden,
    NotFound,
    ServiceUnavailable,
    Unauthorized,
    UnknownError,
    ValidationError,
)
from flynn.types.status import Health, Status, StatusDocument
from flynn.version import VERSION

log = logging.getLogger(__name__)


class _Malformed(logging.Filter):
    """Makes one plain line of what the library reports at length: half a request is no failure of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | ConnectionError):
            reason = " ".join((error.message if isinstance(error, HttpProcessingError) else str(error)).split())[:200]
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args, record.exc_info = f"no whole request: {reason}", (), None
        return True


logging.getLogger("aiohttp.server").addFilter(_Malformed())

T = TypeVar("T")

MAX_BODY_BYTES = 16 * 1024 * 1024
SHUTDOWN_SECONDS = 5.0  # what a listener that is closed gives the requests still running
RENEWAL_CHECK_SECONDS = 60.0
STATUS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Raw:
    """A body sent as it is."""

    body: bytes | str = b""
    content_type: str = "application/octet-stream"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Streaming:
    """A body sent piece by piece; leaving the iterator early means that the client went away."""

    chunks: AsyncIterable[bytes]
    content_type: str = "application/octet-stream"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)  # a Content-Length here makes it a plain body


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events: each item becomes one message. The headers go out before the first item is asked for.

    An `ApiError` raised by the iterator is told to the client as an error event, any other one as a generic text.
    A client that takes nothing for `patience` seconds is disconnected; until then at most 64 items wait for it here.
    """

    items: AsyncIterable[Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = 30.0


class Request:
    """One request, with its caller already known."""

    def __init__(self, raw: web.Request, peer: Peer | None, max_body_bytes: int) -> None:
        self._raw = raw
        self._max_body_bytes = max_body_bytes
        self.peer = peer
        self.id = raw.headers.get("X-Request-ID") or str(uuid.uuid4())
        self.method = raw.method
        self.raw_path = raw.path
        self.headers: Mapping[str, str] = raw.headers
        self.upgraded = False

    def path(self, name: str) -> str:
        """A parameter of the path, percent-decoded."""
        return self._raw.match_info[name]

    def query(self, name: str, default: str = "") -> str:
        return self._raw.query.get(name, default)

    def queries(self, name: str) -> list[str]:
        return self._raw.query.getall(name, [])

    def has_query(self, name: str) -> bool:
        return name in self._raw.query

    def header(self, name: str, default: str = "") -> str:
        return self._raw.headers.get(name, default)

    @property
    def query_string(self) -> str:
        return self._raw.query_string

    @property
    def remote(self) -> str:
        """The client's address: the last X-Forwarded-For entry, else the other end of the connection."""
        forwarded = self.header("X-Forwarded-For").rpartition(",")[2].strip()
        return forwarded or self._raw.remote or ""

    @property
    def other_end(self) -> str:
        """The address of the connection itself, whatever the request's headers say."""
        return self._raw.remote or ""

    @property
    def accepts_events(self) -> bool:
        return "text/event-stream" in self.header("Accept")

    @property
    def basic_auth(self) -> tuple[str, str] | None:
        """User and password of HTTP basic authentication."""
        return _basic_auth(self.header("Authorization"))

    async def body(self, type: type[T], *, any_content_type: bool = False) -> T:
        """The JSON body as `type`. Raises ValidationError, BadSyntax or BodyTooBig."""
        if not any_content_type and "application/json" not in self.header("Content-Type"):
            raise ValidationError("", "Content-Type must be application/json")
        raw = await self.raw()
        if not raw.strip():
            raise BadSyntax("The provided JSON input is invalid: the body is empty")
        return decode_first(raw, type)

    async def raw(self) -> bytes:
        if (self._raw.content_length or 0) > self._max_body_bytes:
            raise BodyTooBig(f"the body is larger than {self._max_body_bytes} bytes")
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise BodyTooBig(f"the body is larger than {self._max_body_bytes} bytes")
        return bytes(body)

    @property
    def content_length(self) -> int | None:
        return self._raw.content_length

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, without a limit. Raises ConnectionError when the client breaks off."""
        try:
            async for chunk in self._raw.content.iter_any():
                yield chunk
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise ConnectionError("the client broke off in the middle of the body") from error

    async def upgrade(self, protocol: str) -> RawConnection:
        """Answer 101 and take over the connection, which ends when the handler returns."""
        await self.raw()
        transport, handler = self._raw.transport, self._raw.protocol
        if transport is None:
            raise ConnectionError("the client is gone")
        loop = asyncio.get_running_loop()
        reader = LastWordsReader(limit=BUFFER_BYTES, loop=loop)
        takeover = asyncio.StreamReaderProtocol(reader, loop=loop)
        takeover.connection_made(transport)
        transport.set_protocol(takeover)
        transport.resume_reading()  # the library pauses when much has come early
        tail, handler._message_tail = getattr(handler, "_message_tail", b""), b""
        if tail:
            reader.feed_data(tail)
        if isinstance(handler, _Connection):
            handler.taken_over()
        self.upgraded = True
        transport.write(
            f"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode()
        )
        return ServedConnection(reader, asyncio.StreamWriter(transport, takeover, reader, loop))


_UPGRADE = re.compile(rb"[A-Z]+ \S+ HTTP/1\.1\r\n(?:[^\r\n]*\r\n)*?(?i:upgrade):[^\r\n]*\r\n")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding:")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n")


class _Connection(web.RequestHandler):
    """The library's protocol, which also keeps what comes behind a request for an upgrade.

    The library takes those bytes for the next request, unless the upgrade is to websockets. A client may send them
    before it has seen our answer, and they belong to the new protocol. Should the upgrade be refused, they are another
    request after all: the library looks at what it has kept.
    """

    __slots__ = ("_body_left",)  # of the body of a request for an upgrade; None: there is no such request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._body_left: int | None = None

    def taken_over(self) -> None:
        """Nobody will tell this protocol when its connection is lost: have the server forget it after this request."""
        if self._manager is not None:
            self._manager.connection_lost(self)

    def data_received(self, data: bytes) -> None:
        if self._body_left is None and not self._upgraded and self._current_request is None and not self._messages:
            end = data.find(b"\r\n\r\n") + 4
            # The end of a chunked body is not known in advance: of such a request nothing behind it is kept.
            if end >= 4 and _UPGRADE.match(data, 0, end) is not None and _CHUNKED.search(data, 0, end) is None:
                length = _LENGTH.search(data, 0, end)
                self._body_left = end + (int(length[1]) if length else 0)
        if self._body_left is None:
            super().data_received(data)
            return
        request, rest = data[: self._body_left], data[self._body_left :]
        self._body_left -= len(request)
        super().data_received(request)
        if self._body_left == 0:
            self._body_left = None
            self._upgraded = True
            super().data_received(rest)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return _Server(
            plain.request_handler,
            request_factory=plain.request_factory,
            handler_cancellation=plain.handler_cancellation,
            loop=plain._loop,
            **plain._kwargs,
        )


Handler = Callable[[Request], Awaitable[Any]]
StatusCheck = Callable[[], Awaitable[Status]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    handler: Handler
    allow: Access
    max_body_bytes: int


class Api:
    """The endpoints of one daemon. `endpoints` is the table of who may do what; tests walk it."""

    def __init__(
        self,
        name: str,
        *,
        version: str = VERSION,
        status: StatusCheck | None = None,
        status_access: Access = ANYONE,
        max_body_bytes: int = MAX_BODY_BYTES,
        authorize: Callable[[Request], None] | None = None,
        bare: frozenset[int] = frozenset(),
        before: Callable[[Request], Raw | None] | None = None,
        headers: Callable[[Request], Mapping[str, str]] | None = None,
        redirect_slash: bool = False,
    ) -> None:
        """
        Args:
            status: computes the status document; None = always healthy.
            authorize: raises Unauthorized, after the rule of access has admitted the peer. Not asked for /ping.
            bare: status codes of refusals that are sent without a body (the controller's 401 and 404).
            before: may answer a request before anything else is looked at.
            headers: adds to every answer.
            redirect_slash: a slash too much at the end of a path is answered with the way to the path without.
        """
        self.name = name
        self.version = version
        self.endpoints: list[Endpoint] = []
        self._status = status
        self._max_body_bytes = max_body_bytes
        self._authorize = authorize
        self._bare = bare
        self._before = before
        self._headers = headers
        self._redirect_slash = redirect_slash
        self.route("GET", "/ping", _pong, allow=ANYONE)
        self.route("GET", "/.well-known/status", self._well_known_status, allow=status_access)
        self.route("GET", "/metrics", _metrics, allow=INSIDERS)

    def route(
        self, method: str, path: str, handler: Handler, *, allow: Access, max_body_bytes: int | None = None
    ) -> None:
        """Add an endpoint. `{name}` in the path is one segment, `{name:.*}` the rest; method "*" is any.

        An endpoint declared again replaces the earlier one: a daemon may have its own /ping.
        """
        self.endpoints = [known for known in self.endpoints if (known.method, known.path) != (method, path)]
        limit = self._max_body_bytes if max_body_bytes is None else max_body_bytes
        self.endpoints.append(Endpoint(method, path, handler, allow, limit))

    async def _well_known_status(self, request: Request) -> Raw:
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                status = await self._status() if self._status else Status(version=self.version)
        except Exception as error:  # The edge: a check that fails is an answer, not a failure of the answer.
            log.warning("status check failed", extra={"error": repr(error)})
            status = Status(status=Health.UNHEALTHY, detail={"error": str(error)}, version=self.version)
        code = HTTPStatus.OK if status.healthy else HTTPStatus.INTERNAL_SERVER_ERROR
        return Raw(encode_indented(builtins(StatusDocument(data=status))), "application/json", code)

    # The rest turns aiohttp requests into Requests and what handlers return or raise into responses.

    def _application(self, key: str | None, pending: set[asyncio.Task[Any]], leaving: asyncio.Event) -> web.Application:
        application = web.Application(
            client_max_size=1 << 62, middlewares=[web.middleware(self._unknown_is_404(key))], handler_args={}
        )

        async def say_goodbye(request: web.Request, response: web.StreamResponse) -> None:
            if leaving.is_set():
                response.force_close()  # the connection is about to end: no further request is to be sent on it

        application.on_response_prepare.append(say_goodbye)
        for endpoint in self.endpoints:
            application.router.add_route(
                endpoint.method, endpoint.path, self._adapter(endpoint, key, pending), expect_handler=_no_continue_limit
            )
        return application

    def _unknown_is_404(self, key: str | None) -> Middleware:
        async def middleware(request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
            try:
                return _closing_if_unread(request, await handler(request))
            except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
                led = self._redirect_slash and isinstance(error, web.HTTPNotFound)
                if led and (elsewhere := await _without_slash(request)) is not None:
                    return _closing_if_unread(request, elsewhere)
                asked = Request(request, _caller(request, key), self._max_body_bytes)
                extra = dict(self._headers(asked)) if self._headers else {}
                try:
                    if self._before is not None and (early := self._before(asked)) is not None:
                        return _closing_if_unread(request, _raw_response(early, extra))
                    if self._authorize is not None:
                        # Whoever may not come in does not learn what is there either.
                        self._authorize(asked)
                except ApiError as error:
                    return _closing_if_unread(request, self._refusal(error, extra))
                unknown = web.Response(status=404, text="404 page not found\n", headers=extra)
                return _closing_if_unread(request, unknown)

        return middleware

    def _adapter(
        self, endpoint: Endpoint, key: str | None, pending: set[asyncio.Task[Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def adapter(raw: web.Request) -> web.StreamResponse:
            request = Request(raw, _caller(raw, key), endpoint.max_body_bytes)
            extra = dict(self._headers(request)) if self._headers else {}
            try:
                if self._before is not None and (early := self._before(request)) is not None:
                    return _raw_response(early, extra)
                self._admit(endpoint, request, with_key=key is not None)
                # A client that goes away ends a stream at once, but never interrupts a handler half-way.
                task = asyncio.ensure_future(endpoint.handler(request))
                pending.add(task)
                task.add_done_callback(lambda done: _finished(done, pending, raw))
                result = await asyncio.shield(task)
                if request.upgraded:
                    return _Upgraded()
                return await _respond(raw, result, extra)
            except ApiError as error:
                if request.upgraded:
                    return _Upgraded()
                return self._refusal(error, extra)
            except (ConnectionError, web.HTTPException):
                raise
            except Exception as error:  # The edge: one request fails, the daemon goes on.
                log.exception("request failed", extra={"method": raw.method, "path": raw.path, "request": request.id})
                if request.upgraded:
                    return _Upgraded()
                retry = isinstance(error, OSError | TimeoutError)
                return self._refusal(UnknownError("Something went wrong", retry=retry), extra)

        return adapter

    def _admit(self, endpoint: Endpoint, request: Request, *, with_key: bool) -> None:
        if not endpoint.allow.admits(request.peer):
            if request.peer is None:
                raise Unauthorized("a client certificate of the cluster is needed" if not with_key else "wrong key")
            raise Forbidden(f"{request.peer} may not {request.method} {endpoint.path}")
        if self._authorize is not None and request.raw_path != "/ping":
            self._authorize(request)

    def _refusal(self, error: ApiError, headers: Mapping[str, str]) -> web.Response:
        if error.status in self._bare and isinstance(error, NotFound | Unauthorized):
            return web.Response(status=error.status, headers=headers)
        document: dict[str, Any] = {"code": error.code, "message": error.message}
        if error.detail is not None:
            document["detail"] = error.detail
        document["retry"] = error.retry
        return web.Response(
            status=error.status, body=encode(document), content_type="application/json", headers=headers
        )


class _Upgraded(web.Response):
    """Stands for a connection that is no longer HTTP: nothing more is written, and it is closed."""

    async def prepare(self, request: web.BaseRequest) -> None:
        self.force_close()

    async def write_eof(self, data: bytes = b"") -> None:
        return


def _closing_if_unread(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """An answer that comes before the whole body ends the connection.

    Otherwise a proxy takes it for idle and sends the next request after the rest of the body, which is waited for.
    """
    if not response.prepared and request.can_read_body:
        response.force_close()
    return response


async def _without_slash(request: web.Request) -> web.Response | None:
    """The original's redirection (301 for GET, 307 with the body sent again for others) to a path that there is."""
    path = request.rel_url.raw_path
    if len(path) < 2 or not path.endswith("/"):
        return None
    target = request.rel_url.with_path(path.rstrip("/"), encoded=True, keep_query=True)
    found = await request.app.router.resolve(request.clone(rel_url=target))
    if found.http_exception is not None or target.raw_path.startswith("//"):
        return None
    return web.Response(status=301 if request.method == "GET" else 307, headers={"Location": str(target)})


async def _no_continue_limit(request: web.Request) -> None:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _pong(request: Request) -> Raw:
    return Raw(b"", "text/plain")


async def _metrics(request: Request) -> Raw:
    from prometheus_client import generate_latest  # Most daemons are never scraped.

    return Raw(generate_latest(), "text/plain; version=0.0.4")


def _caller(raw: web.Request, key: str | None) -> Peer | None:
    """Who is calling: by certificate, or by the admin key on a listener that has one."""
    if raw.transport is None:
        return None
    if key is not None:
        credentials = _basic_auth(raw.headers.get("Authorization", ""))
        if credentials is not None and hmac.compare_digest(credentials[1].encode(), key.encode()):
            return Peer(PeerKind.OPERATOR, "key")
        return None
    peer = peer_of(raw.transport.get_extra_info("peercert"))
    if peer is not None and peer.kind is PeerKind.APP and peer.name == "router" and "X-Forwarded-For" in raw.headers:
        return Peer(PeerKind.OUTSIDE, "router")
    return peer


def _basic_auth(header: str) -> tuple[str, str] | None:
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:
        return None
    return (user, password) if colon else None


async def _respond(raw: web.Request, result: Any, extra: Mapping[str, str]) -> web.StreamResponse:
    match result:
        case None:
            return web.Response(status=200, headers=extra)
        case Raw():
            return _raw_response(result, extra)
        case EventStream():
            return await _send_events(raw, result, extra)
        case Streaming():
            return await _send_chunks(raw, result, extra)
    return web.Response(status=200, body=encode(result), content_type="application/json", headers=extra)


def _raw_response(result: Raw, extra: Mapping[str, str]) -> web.Response:
    body = result.body.encode() if isinstance(result.body, str) else result.body
    headers = {**extra, **result.headers}
    if body or result.content_type != "application/octet-stream":
        headers["Content-Type"] = result.content_type
    return web.Response(status=result.status, body=body, headers=headers)


async def _send_chunks(raw: web.Request, result: Streaming, extra: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(
        status=result.status, headers={**extra, **result.headers, "Content-Type": result.content_type}
    )
    await response.prepare(raw)
    try:
        async for chunk in result.chunks:
            await response.write(chunk)
    except ConnectionError:
        raise
    except Exception as error:
        # The status is out already: cut the connection, so that the client sees an incomplete body.
        log.error("a streamed answer broke off", extra={"path": raw.path, "error": repr(error)})
        if raw.transport is not None:
            raw.transport.close()
        return response
    finally:
        # The client may have left between two pieces; a generator is to end now, not when it is collected.
        if isinstance(result.chunks, AsyncGenerator):
            await result.chunks.aclose()
    await response.write_eof()
    return response


async def _send_events(raw: web.Request, result: EventStream, extra: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={**extra, **result.headers, "Content-Type": sse.CONTENT_TYPE, "Cache-Control": "no-cache"}
    )
    await response.prepare(raw)
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(64)

    async def pump() -> None:
        # One task runs the iterator from beginning to end, so that it may use timeouts and task groups.
        last: bytes | None = None
        try:
            async for item in result.items:
                await queue.put(item if isinstance(item, bytes) else sse.message(item))
        except ApiError as error:
            last = sse.error(error.message)
        except Exception as error:  # The edge: the stream ends with a word about it.
            log.warning("an event stream failed", extra={"path": raw.path, "error": repr(error)})
            last = sse.error(str(error) or "Something went wrong")
        if last is not None:
            await queue.put(last)
        await queue.put(None)

    pumping = asyncio.ensure_future(pump())
    try:
        ended = False
        while not ended:
            try:
                async with asyncio.timeout(sse.KEEP_ALIVE_SECONDS):
                    item = await queue.get()
            except TimeoutError:
                item = sse.KEEP_ALIVE
            data = item or b""
            ended = item is None
            while not ended and not queue.empty():
                item = queue.get_nowait()
                data += item or b""
                ended = item is None
            try:
                async with asyncio.timeout(result.patience):
                    if data:
                        await response.write(data)
            except TimeoutError:
                log.info("a reader of events takes nothing, hanging up", extra={"path": raw.path})
                if raw.transport is not None:
                    raw.transport.abort()
                return response
        await response.write_eof()
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
    return response


def _finished(task: asyncio.Task[Any], pending: set[asyncio.Task[Any]], raw: web.Request) -> None:
    """Take note of how a handler ended; of a refusal nobody waits for any more there is nothing to say."""
    pending.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, ApiError | ConnectionError) and raw.transport is None:
        log.error("request failed", extra={"method": raw.method, "path": raw.path}, exc_info=error)


@asynccontextmanager
async def listen(
    api: Api,
    host: str,
    port: int,
    *,
    tls: Identity | ssl.SSLContext | None = None,
    require_client: bool = True,
    key: str | None = None,
    sock: Any = None,
    linger: float = 0.0,
) -> AsyncIterator[tuple[str, int]]:
    """Serve `api` while the block is open; gives the bound address (`port` 0 picks one).

    Args:
        tls: an identity (its renewed certificates are picked up), or a ready context, or None for plain HTTP.
        require_client: refuse connections without a client certificate; turn off only for endpoints of `ANYONE`.
        key: the admin key of a plain listener on loopback; callers that know it are the operator.
        sock: an already listening socket, instead of host and port.
        linger: seconds at the end in which nothing new is accepted, but answered what has been, saying goodbye.
    """
    if tls is None and key is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError("plain HTTP without a key is for loopback only")
    pending: set[asyncio.Task[Any]] = set()
    leaving = asyncio.Event()
    context = tls.server_context(require_client=require_client) if isinstance(tls, Identity) else tls
    runner = _Runner(
        api._application(key, pending, leaving),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=180,
        shutdown_timeout=SHUTDOWN_SECONDS,
        tcp_keepalive=True,
    )
    await runner.setup()
    site: web.BaseSite
    if sock is not None:
        site = web.SockSite(runner, sock, ssl_context=context)
    else:
        site = web.TCPSite(runner, host, port, ssl_context=context, reuse_address=True, backlog=512)
    renewal: asyncio.Task[NoReturn] | None = None
    try:
        await site.start()
        if isinstance(tls, Identity) and context is not None:
            renewal = asyncio.ensure_future(_refresh(tls, context))
        yield tuple(runner.addresses[0][:2])
    finally:
        if renewal is not None:
            renewal.cancel()
        if linger:
            leaving.set()
            await site.stop()
            await asyncio.sleep(linger)
        await runner.cleanup()
        for task in pending:
            task.cancel()


async def _refresh(identity: Identity, context: ssl.SSLContext) -> NoReturn:
    stamp = identity.stamp()
    while True:
        await asyncio.sleep(RENEWAL_CHECK_SECONDS)
        try:
            if identity.stamp() != stamp:
                identity.refresh(context)
                stamp = identity.stamp()
        except (OSError, ssl.SSLError) as error:
            log.warning("could not load the renewed certificate", extra={"error": str(error)})


def shutting_down(name: str) -> ServiceUnavailable:
    return ServiceUnavailable(f"{name}: shutting down")
