"""Bytes from a repository: a directory, or HTTP with time limits, proxies, and retries that go on where it broke off.

Everything that is fetched is verified by those who asked for it; here it is only kept from being endless or slow.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from flynn.aio.backoff import Backoff
from flynn.host.download.errors import Unavailable
from flynn.version import VERSION

CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server may take its time for."""

    answer: timedelta = timedelta(seconds=30)  # from connecting to the end of the headers
    silence: timedelta = timedelta(seconds=30)  # without a byte
    window: timedelta = timedelta(seconds=30)
    window_bytes: int = 64 * 1024  # less than this in a window is an attack, or a line that would take days
    tries: int = 8  # of one file, in all: a server that breaks off again and again is given up
    pause: Backoff = field(default=Backoff(first=timedelta(milliseconds=500), limit=timedelta(seconds=10)))


class Interrupted(Exception):
    """The connection failed or broke; the same request may work when it is repeated."""


class Source(Protocol):
    """Where a repository is."""

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        """Yield a file from `offset` on.

        Raises:
            DownloadHTTPError: there is no such file (404), or the server refuses.
            SlowRetrievalError, Interrupted
        """

    def cut(self) -> None:
        """Break off whatever is being read, from another thread. Nothing can be read afterwards."""


class Pace:
    """Tells a slow line from one that is kept slow: each window of time must bring a minimum of bytes."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits, self._began, self._bytes = limits, now, 0

    def note(self, count: int, now: float) -> None:
        """Count bytes that have arrived. Raises `SlowRetrievalError` if a window has ended with too few."""
        self._bytes += count
        if now - self._began < self._limits.window.total_seconds():
            return
        if self._bytes < self._limits.window_bytes:
            elapsed = now - self._began
            raise SlowRetrievalError(f"{self._bytes} bytes in {elapsed:.0f} s, expected {self._limits.window_bytes}")
        self._began, self._bytes = now, 0


class Fetcher(FetcherInterface):
    """Fetches files of one repository, going on where a connection broke off."""

    def __init__(self, source: Source, limits: Limits, sleep: Callable[[float], None] = time.sleep) -> None:
        self._source, self._limits, self._sleep = source, limits, sleep

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.chunks(unquote(url), 0)

    def chunks(self, path: str, offset: int) -> Iterator[bytes]:
        """Yield a file of the repository from `offset` on. Raises the TUF library's download errors."""
        delays = self._limits.pause.delays()
        for attempt in range(1, self._limits.tries + 1):
            try:
                for chunk in self._source.read(path, offset):
                    offset += len(chunk)
                    yield chunk
                return
            except Interrupted as error:
                if attempt == self._limits.tries:
                    raise DownloadError(f"{path}: {error}, {attempt} times") from error
                self._sleep(next(delays))


class Directory:
    """A repository in a directory."""

    def __init__(self, path: Path) -> None:
        self._path, self._open = path, True

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        if ".." in path.split("/"):
            raise DownloadHTTPError(f"{path} is outside of the repository", 404)
        try:
            with (self._path / path.lstrip("/")).open("rb") as file:
                file.seek(offset)
                while self._open and (chunk := file.read(CHUNK_BYTES)):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DownloadHTTPError(f"{self._path} has no {path}", 404) from error
        except OSError as error:
            raise DownloadError(f"{self._path / path}: {error.strerror or error}") from error
        if not self._open:
            raise DownloadError("broken off")

    def cut(self) -> None:
        self._open = False


class Web:
    """A repository behind HTTP or HTTPS. Certificates are checked against the system's; proxies are those of the
    environment. Several threads may read at the same time."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._url, self._limits = url.rstrip("/"), limits
        self._grips: set[_Grip] = set()
        self._lock = threading.Lock()  # guards _grips and _cut
        self._cut = False

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        address = f"{self._url}/{quote(path.lstrip('/'))}"
        headers = {"User-Agent": f"flynn-host/{VERSION}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self._gripped() as grip:
            with _within(self._limits.answer, grip) as in_time:
                try:
                    opener = _opener(grip)
                    asked = request.Request(address, headers=headers)
                    answer = opener.open(asked, timeout=self._limits.silence.total_seconds())
                except HTTPError as error:
                    error.close()
                    if error.code in (429, 500, 502, 503, 504):
                        raise Interrupted(f"the server answers {error.code}") from error
                    if error.code == 416 and offset:  # the file ends here
                        return
                    raise DownloadHTTPError(f"{address}: {error.code} {error.reason}", error.code) from error
                except (URLError, OSError, http.client.HTTPException) as error:
                    if not in_time():
                        raise SlowRetrievalError(f"{address}: no answer in {self._limits.answer}") from error
                    raise Interrupted(_reason(error)) from error
            with answer:
                if not in_time():  # the library takes headers that break off for complete ones
                    raise SlowRetrievalError(f"{address}: no answer in {self._limits.answer}")
                yield from self._body(answer, address, offset)

    def _body(self, answer: Any, address: str, offset: int) -> Iterator[bytes]:
        skip = 0
        if offset:
            first = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            if answer.status == 206 and first and int(first[1]) != offset:
                raise Interrupted("the server sent another part than asked for")
            skip = offset if answer.status != 206 else 0  # it knows no ranges and has begun anew
        pace = Pace(self._limits, time.monotonic())
        try:
            while chunk := answer.read1(CHUNK_BYTES):
                pace.note(len(chunk), time.monotonic())
                if kept := chunk[skip:]:
                    yield kept
                skip = max(0, skip - len(chunk))
        except TimeoutError as error:
            raise SlowRetrievalError(f"{address}: silent for {self._limits.silence}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(_reason(error)) from error
        if self._cut:
            raise DownloadError("broken off")
        if answer.length:  # what Content-Length promised and the connection did not bring
            raise Interrupted("the connection was lost")

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            for grip in self._grips:
                grip.break_off()

    @contextmanager
    def _gripped(self) -> Iterator[_Grip]:
        grip = _Grip()
        with self._lock:
            if self._cut:
                raise DownloadError("broken off")
            self._grips.add(grip)
        try:
            yield grip
        finally:
            with self._lock:
                self._grips.discard(grip)
            grip.let_go()


class _Grip:
    """A hold on the connection of a blocking request, so that another thread can end it.

    Time limits of sockets start again with each byte; a server that sends one now and then could hold a thread for
    days before there is a body whose pace can be judged.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._broken = False

    def dial(self, *args: Any, **kwargs: Any) -> socket.socket:
        connected = socket.create_connection(*args, **kwargs)
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = connected.dup()  # TLS takes the first one over
            if self._broken:
                connected.close()
                raise TimeoutError("broken off")
        return connected

    def break_off(self) -> None:
        with self._lock:
            self._broken = True
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended by itself

    def let_go(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


@contextmanager
def _within(limit: timedelta, grip: _Grip) -> Iterator[Callable[[], bool]]:
    """Break the connection off when the block takes longer; the value tells whether that has not happened."""
    late = threading.Event()

    def end() -> None:
        late.set()
        grip.break_off()

    timer = threading.Timer(limit.total_seconds(), end)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: not late.is_set()
    finally:
        timer.cancel()


def _opener(grip: _Grip) -> request.OpenerDirector:
    """What `build_opener` makes, without the ways out of HTTP."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        _PlainHandler(grip),
        _SecureHandler(grip),
        _Redirects(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(request.HTTPRedirectHandler):
    def http_error_302(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()  # the library would read all of the body, however much that is
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _PlainHandler(request.HTTPHandler):
    def __init__(self, grip: _Grip) -> None:
        super().__init__()
        self._grip = grip

    def http_open(self, req: request.Request) -> http.client.HTTPResponse:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            made = http.client.HTTPConnection(host, **options)
            made._create_connection = self._grip.dial  # type: ignore[attr-defined]  # the one hook there is
            return made

        return self.do_open(connection, req)


class _SecureHandler(request.HTTPSHandler):
    def __init__(self, grip: _Grip) -> None:
        super().__init__()
        self._grip = grip

    def https_open(self, req: request.Request) -> http.client.HTTPResponse:
        def connection(host: str, **options: Any) -> http.client.HTTPSConnection:
            made = http.client.HTTPSConnection(host, **options)
            made._create_connection = self._grip.dial  # type: ignore[attr-defined]  # the one hook there is
            return made

        return self.do_open(connection, req)


def source_of(repository: str, limits: Limits) -> Source:
    """Return the source of an address: http, https, file, or the path of a directory."""
    url = urlsplit(repository)
    match url.scheme:
        case "http" | "https":
            return Web(repository, limits)
        case "file":
            return Directory(Path(unquote(url.path)))
        case "":
            return Directory(Path(repository))
    raise Unavailable(f"{repository!r} is no repository: expected a directory, http://, https:// or file://")


def address_of(repository: str) -> str:
    """Return a repository's address in the one form that artifacts carry. Raises `Unavailable` when it is none."""
    try:
        if urlsplit(repository).scheme in ("http", "https", "file"):
            return repository.rstrip("/")
        return Path(repository).absolute().as_uri()
    except ValueError as error:
        raise Unavailable(f"{repository!r} is no repository: {error}") from error


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    return str(inner) or type(inner).__name__
