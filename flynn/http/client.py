"""The HTTP client of every neighbour: typed answers, the server's own errors, retries where they are safe.

    http = HttpClient("https://controller.discoverd:80", tls=identity, auth=KeyAuth(key), retry=Retry())
    app = await http.get("/apps/shop", answer=App)

A connection that fails raises `Unreachable`, a refusal the `ApiError` class the server raised.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from flynn.aio.backoff import Backoff, attempts
from flynn.http.connection import RawConnection, open_raw
from flynn.http.sse import FrameDecoder
from flynn.identity.identity import Identity
from flynn.types.codec import decode, encode
from flynn.types.errors import ApiError, Unreachable, from_wire

T = TypeVar("T")

STREAM_SILENCE_SECONDS = 90.0  # a keep-alive comes every 30 s
CONNECT_SECONDS = 5.0
KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 6000}
"""A machine that lost its power is noticed after 6 s. Seconds, a number of probes, and milliseconds."""


@dataclass(frozen=True, slots=True)
class KeyAuth:
    """A key as the password of HTTP basic authentication."""

    key: str
    user: str = ""

    def header(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.key}".encode()).decode()


@dataclass(frozen=True, slots=True)
class Pinned:
    """Trust exactly one leaf certificate: base64 of the SHA-256 of its DER form. Chain and name do not matter."""

    pin: str

    def digest(self) -> bytes:
        return base64.b64decode(self.pin)


@dataclass(slots=True)
class Position:
    """How far a stream of numbered events has been read: the id of the last one."""

    last_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Try again while nobody answers or the server says `retry`, unless a repetition could do harm."""

    policy: Backoff = field(default_factory=Backoff)
    within: timedelta = timedelta(seconds=10)


Tls = Identity | ssl.SSLContext | Pinned | None
_SAFE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class _NotConnected(Unreachable):
    """Nothing was sent, so any request may be repeated."""


class HttpClient:
    """One server. Connections are pooled; close the client (or use `async with`) when done."""

    def __init__(
        self,
        base_url: str,
        *,
        auth: KeyAuth | None = None,
        tls: Tls = None,
        server_name: str | None = None,
        connect_to: str | None = None,
        timeout: float = 30.0,
        retry: Retry | None = None,
        headers: Mapping[str, str] | None = None,
        live_headers: Callable[[], Mapping[str, str]] | None = None,
        host_header: str = "",
    ) -> None:
        """
        Args:
            server_name: the name to verify the server's certificate against, when it is not the URL's.
            connect_to: `host:port` to connect to instead of what the URL's name resolves to.
            timeout: seconds for a whole plain call, connecting included. Streams only limit silence.
            retry: None = every call is tried once.
            live_headers: asked for what to send besides `headers`, at each request.
            host_header: the site to ask for, when it is not the URL's.
        """
        split = urlsplit(base_url)
        self._host = host_header or split.netloc
        self._name = server_name or (split.hostname if connect_to else None)
        self.base_url = f"{split.scheme}://{connect_to or split.netloc}{split.path.rstrip('/')}"
        self._headers = {"Accept": "application/json", **(headers or {})}
        if connect_to or host_header:
            self._headers["Host"] = self._host
        if auth is not None:
            self._headers["Authorization"] = auth.header()
        self._live_headers = live_headers
        self._tls = tls
        self._timeout = timeout
        self._retry = retry
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # Plain calls.

    @overload
    async def get(self, path: str, *, answer: type[T], params: Mapping[str, str] | None = None) -> T: ...
    @overload
    async def get(self, path: str, *, answer: None = None, params: Mapping[str, str] | None = None) -> None: ...
    async def get(self, path: str, *, answer: Any = None, params: Mapping[str, str] | None = None) -> Any:
        return await self.call("GET", path, answer=answer, params=params)

    @overload
    async def put(
        self, path: str, body: object = None, *, answer: type[T], params: Mapping[str, str] | None = None
    ) -> T: ...
    @overload
    async def put(
        self, path: str, body: object = None, *, answer: None = None, params: Mapping[str, str] | None = None
    ) -> None: ...
    async def put(
        self, path: str, body: object = None, *, answer: Any = None, params: Mapping[str, str] | None = None
    ) -> Any:
        return await self.call("PUT", path, body, answer=answer, params=params)

    @overload
    async def post(
        self, path: str, body: object = None, *, answer: type[T], params: Mapping[str, str] | None = None
    ) -> T: ...
    @overload
    async def post(
        self, path: str, body: object = None, *, answer: None = None, params: Mapping[str, str] | None = None
    ) -> None: ...
    async def post(
        self, path: str, body: object = None, *, answer: Any = None, params: Mapping[str, str] | None = None
    ) -> Any:
        return await self.call("POST", path, body, answer=answer, params=params)

    @overload
    async def delete(self, path: str, *, answer: type[T], params: Mapping[str, str] | None = None) -> T: ...
    @overload
    async def delete(self, path: str, *, answer: None = None, params: Mapping[str, str] | None = None) -> None: ...
    async def delete(self, path: str, *, answer: Any = None, params: Mapping[str, str] | None = None) -> Any:
        return await self.call("DELETE", path, answer=answer, params=params)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        answer: type[T] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> T | None:
        """One call. `body` None sends none; `answer` None ignores what comes back; `bytes` gives it undecoded."""
        payload = None if body is None else encode(body)
        sent = {"Content-Type": "application/json", **(headers or {})}

        async def once() -> T | None:
            async with self._request(method, path, sent, payload, params, timeout or self._timeout) as response:
                raw = await response.read()
                if answer is None:
                    return None
                return raw if answer is bytes else decode(raw, answer)  # type: ignore[return-value]

        if self._retry is None:
            return await once()
        last: ApiError | None = None
        async for _ in attempts(self._retry.policy, self._retry.within):
            try:
                return await once()
            except ApiError as error:
                if not _repeatable(method, error):
                    raise
                last = error
        assert last is not None
        raise last

    # Streams.

    async def events(
        self,
        path: str,
        type: type[T],
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        silence: float = STREAM_SILENCE_SECONDS,
    ) -> AsyncIterator[T]:
        """The events of one connection, until the server ends it. Raises Unreachable when it breaks."""
        sent = {"Accept": "text/event-stream", **(headers or {})}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        async with self._request("GET", path, sent, None, params, timeout) as response:
            async for item in _decoded(response, path, type):
                yield item

    @asynccontextmanager
    async def subscribed(
        self,
        path: str,
        type: type[T],
        *,
        method: str = "GET",
        body: object = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        silence: float = STREAM_SILENCE_SECONDS,
        position: Position | None = None,
    ) -> AsyncIterator[AsyncIterator[T]]:
        """Like `events`, but the subscription stands when the block is entered: subscribe, then act.

        A `position` is where to begin, if it says anything, and is kept up to date: by the head of the answer, which
        says where the stream begins, and by each event.
        """
        sent = {"Accept": "text/event-stream", "Content-Type": "application/json", **(headers or {})}
        if position is not None and position.last_id:
            sent["Last-Event-ID"] = position.last_id
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        payload = None if body is None else encode(body)
        async with self._request(method, path, sent, payload, params, timeout) as response:
            if position is not None:
                position.last_id = response.headers.get("Last-Event-ID", position.last_id)
            yield _decoded(response, path, type, position)

    @asynccontextmanager
    async def download(
        self,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        silence: float = STREAM_SILENCE_SECONDS,
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        """The headers and the body piece by piece. A `body` is sent as JSON (the host's snapshots are asked for so)."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        sent = {"Accept": "*/*", **({} if body is None else {"Content-Type": "application/json"}), **(headers or {})}
        payload = None if body is None else encode(body)
        async with self._request("GET", path, sent, payload, params, timeout) as response:

            async def chunks() -> AsyncIterator[bytes]:
                with _translated(path):
                    async for chunk in response.content.iter_any():
                        yield chunk

            yield response.headers, chunks()

    async def head(self, path: str, *, params: Mapping[str, str] | None = None) -> Mapping[str, str]:
        """The headers that GET would answer with."""
        async with self._request("HEAD", path, {"Accept": "*/*"}, None, params, self._timeout) as response:
            return response.headers

    async def upload(
        self,
        path: str,
        body: bytes | AsyncIterable[bytes],
        *,
        method: str = "PUT",
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Mapping[str, str]:
        """Send a body piece by piece; gives the answer's headers. `timeout` None limits only connecting."""
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
        async with self._request(
            method, path, {"Content-Type": "application/octet-stream", **(headers or {})}, body, params, limit
        ) as response:
            await response.read()
            return response.headers

    async def upgrade(self, path: str, body: object, protocol: str, *, method: str = "POST") -> RawConnection:
        """Send `body` and take over the connection when the server answers 101. The caller closes it."""
        split = urlsplit(self.base_url + path)
        payload = encode(body)
        context = self._ssl_context() if split.scheme == "https" else None
        port = split.port or (443 if context else 80)
        name = self._name or split.hostname if context else None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await open_raw(split.hostname or "", port, ssl=context, server_hostname=name)
        except (OSError, TimeoutError) as error:
            raise _NotConnected(f"{self.base_url}: {_reason(error)}") from error
        if isinstance(self._tls, Pinned) and context is not None:
            _check_pin(self._tls, writer)
        headers = {
            "Host": self._host,
            **self._headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(payload)),
            "Connection": "upgrade",
            "Upgrade": protocol,
        }
        target = split.path + (f"?{split.query}" if split.query else "")
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        try:
            writer.write(head.encode() + b"\r\n" + payload)
            async with asyncio.timeout(self._timeout):
                await writer.drain()
                answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                status = int(answer.split(" ", 2)[1])
                if status == 101:
                    return RawConnection(reader, writer)
                raise _refusal(status, await _rest(answer, reader))
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            writer.close()
            raise Unreachable(f"{self.base_url}: {_reason(error)}") from error
        except BaseException:
            writer.close()
            raise

    # Underneath.

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Any,
        params: Mapping[str, str] | None,
        timeout: float | aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if not isinstance(timeout, aiohttp.ClientTimeout):
            timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(CONNECT_SECONDS, timeout))
        live = self._live_headers() if self._live_headers is not None else {}
        with _translated(f"{method} {self.base_url}{path}"):
            response = await self._open().request(
                method,
                URL(self.base_url + path, encoded=True),
                params=params,
                headers={**self._headers, **live, **headers},
                data=body,
                timeout=timeout,
                ssl=self._ssl(),
                server_hostname=self._name,
                allow_redirects=True,
            )
        async with response:
            if not 200 <= response.status < 300:
                with _translated(path):
                    raise _refusal(response.status, await response.read())
            try:
                yield response
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unreachable(f"{method} {self.base_url}{path}: {_reason(error)}") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Names are looked up each time: discoverd's answers change with every failover.
            connector = aiohttp.TCPConnector(
                use_dns_cache=False, limit=0, keepalive_timeout=30, socket_factory=_attentive_socket
            )
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session

    def _ssl(self) -> ssl.SSLContext | aiohttp.Fingerprint | bool:
        match self._tls:
            case Pinned():
                return aiohttp.Fingerprint(self._tls.digest())
            case Identity():
                return self._tls.client_context()
            case None:
                return True
        return self._tls

    def _ssl_context(self) -> ssl.SSLContext:
        if isinstance(self._tls, Pinned):
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        if isinstance(self._tls, Identity):
            return self._tls.client_context()
        return self._tls or ssl.create_default_context()


def _attentive_socket(address: Any) -> socket.socket:
    """A socket that notices when the machine at the other end is gone, which a stream would not for a long time."""
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):  # not every system that the client runs on has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock


def _check_pin(pinned: Pinned, writer: asyncio.StreamWriter) -> None:
    import hashlib

    certificate = writer.get_extra_info("ssl_object").getpeercert(True)
    if hashlib.sha256(certificate).digest() != pinned.digest():
        writer.close()
        raise Unreachable("the server's certificate does not match the pin", retry=False)


def _repeatable(method: str, error: ApiError) -> bool:
    if isinstance(error, _NotConnected):
        return True
    if isinstance(error, Unreachable):
        return error.retry and method in _SAFE
    return error.retry


async def _decoded(
    response: aiohttp.ClientResponse, path: str, type: type[T], position: Position | None = None
) -> AsyncIterator[T]:
    """The events of a response's body; an error event is raised."""
    decoder = FrameDecoder()
    with _translated(path):
        async for chunk in response.content.iter_any():
            for frame in decoder.feed(chunk):
                if frame.event == "error":
                    raise ApiError(frame.data.decode("utf-8", "replace"))
                if position is not None and frame.id:
                    position.last_id = frame.id  # before the event is used: it will not come again
                yield decode(frame.data, type)


class _translated:
    """Turns the HTTP library's exceptions into ours."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ApiError | asyncio.CancelledError) or error is None:
            return
        if isinstance(error, aiohttp.ServerFingerprintMismatch):
            raise Unreachable("the server's certificate does not match the pin", retry=False) from error
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            raise Unreachable(f"{self._what}: {_reason(error)}", retry=False) from error
        if isinstance(error, aiohttp.ClientConnectorError):
            raise _NotConnected(f"{self._what}: {_reason(error)}") from error
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise Unreachable(f"{self._what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        # The library's own text shows the TLS settings as an object.
        cause = error.os_error
        known = cause.errno is not None and cause.errno > 0  # name look-ups have negative ones
        text = os.strerror(cause.errno) if known and cause.errno else cause.strerror or str(cause)
        return f"cannot connect to {error.host}:{error.port}: {text}"
    return str(error) or type(error).__name__


def _refusal(status: int, body: bytes) -> ApiError:
    try:
        document = decode(body, dict[str, Any])
        if "code" not in document:
            return from_wire(status, "", body.decode("utf-8", "replace"), None, False)
        return from_wire(
            status,
            str(document.get("code", "")),
            str(document.get("message", "")),
            document.get("detail"),
            bool(document.get("retry")),
        )
    except ApiError:
        text = body.decode("utf-8", "replace").strip() or ("resource not found" if status == 404 else "")
        return from_wire(status, "", text or f"unexpected status {status}", None, False)


async def _rest(head: str, reader: asyncio.StreamReader) -> bytes:
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return await reader.readexactly(int(value))
    return b""
