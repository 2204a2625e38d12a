"""Fetching over HTTP from servers that break off, dawdle or never end."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

from flynn.host.download.errors import Reason, Refused, Unavailable
from flynn.host.download.fetch import Directory, Fetcher, Limits, Pace, Web, address_of
from tests.publisher import Publisher

from .conftest import QUICK, Host

CONTENT = bytes(range(256)) * 400

Answer = Callable[[socket.socket, str, int], None]
"""Serves one request: the connection, its path, where the asked range begins (0 = all)."""


class Server:
    """Answers the first request by the first of `script`, and so on; those after the end by the last."""

    def __init__(self, *script: Answer) -> None:
        self.script, self.asked = list(script), list[tuple[str, int]]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65536)
                if not received:
                    return
                head += received
            path = head.split(b" ")[1].decode()
            asked = re.search(rb"Range: bytes=(\d+)-", head)
            offset = int(asked[1]) if asked else 0
            self.asked.append((path, offset))
            answer = self.script[min(len(self.asked), len(self.script)) - 1]
            try:
                answer(connection, path, offset)
            except OSError:
                pass  # the client has had enough

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*script: Answer) -> Server:
        servers.append(Server(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def head(status: str = "200 OK", length: int | None = None, **more: str) -> bytes:
    headers = {"Content-Length": str(length)} if length is not None else {}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode()


def ranged(connection: socket.socket, path: str, offset: int) -> None:
    if not offset:
        return whole(connection, path, offset)
    part = CONTENT[offset:]
    span = f"bytes {offset}-{len(CONTENT) - 1}/{len(CONTENT)}"
    connection.sendall(head("206 Partial Content", len(part), Content_Range=span) + part)
    return None


def whole(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head(length=len(CONTENT)) + CONTENT)


def breaks_off(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head(length=len(CONTENT)) + CONTENT[:1000])


def breaks_off_in_a_chunk(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head(Transfer_Encoding="chunked") + b"ffff\r\n" + CONTENT[:1000])


def hangs_up(connection: socket.socket, path: str, offset: int) -> None:
    return


def says(status: str) -> Answer:
    return lambda connection, path, offset: connection.sendall(head(status, 0))


def silent(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head(length=len(CONTENT)) + CONTENT[:5000])
    time.sleep(3)


def trickles(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head(length=len(CONTENT)))
    for byte in CONTENT[:200]:
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


def trickles_headers(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        connection.sendall(b"X-%d: later\r\n" % number)
        time.sleep(0.02)


def endless(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head())
    while True:
        connection.sendall(b"x" * 65536)


def endless_error(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head("404 Not Found"))
    while True:
        connection.sendall(b"x" * 65536)


def redirects_endlessly_long(connection: socket.socket, path: str, offset: int) -> None:
    connection.sendall(head("302 Found", Location="/elsewhere"))
    while True:
        connection.sendall(b"x" * 65536)


def redirects(target: str) -> Answer:
    return lambda connection, path, offset: connection.sendall(head("302 Found", 0, Location=target))


def fetched(server: Server, limits: Limits = QUICK) -> bytes:
    return b"".join(Fetcher(Web(server.url, limits), limits).chunks("layers/a", 0))


@pytest.mark.parametrize(
    ("script", "ranges"),
    [
        pytest.param([whole], [0], id="at once"),
        pytest.param([breaks_off, ranged], [0, 1000], id="broken off, goes on"),
        pytest.param([breaks_off, whole], [0, 1000], id="broken off, the server knows no ranges"),
        pytest.param([breaks_off_in_a_chunk, ranged], [0, 1000], id="broken off in a chunk"),
        pytest.param([hangs_up, whole], [0, 0], id="hung up before the answer"),
        pytest.param([says("503 Busy"), whole], [0, 0], id="busy at first"),
        pytest.param([redirects("/elsewhere"), whole], [0, 0], id="redirected"),
        pytest.param([redirects_endlessly_long, whole], [0, 0], id="redirected by an endless page"),
    ],
)
def test_fetched_in_the_end(serve: Callable[..., Server], script: list[Answer], ranges: list[int]) -> None:
    server = serve(*script)
    assert fetched(server) == CONTENT
    assert [offset for _, offset in server.asked] == ranges


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        pytest.param(says("404 Not Found"), DownloadHTTPError, "404", id="missing"),
        pytest.param(endless_error, DownloadHTTPError, "404", id="missing, says an endless page"),
        pytest.param(hangs_up, DownloadError, "3 times", id="hangs up each time"),
        pytest.param(says("500 Oops"), DownloadError, "answers 500, 3 times", id="broken each time"),
        pytest.param(silent, SlowRetrievalError, "silent for", id="silent"),
        pytest.param(trickles, SlowRetrievalError, "bytes in", id="a byte now and then"),
        pytest.param(trickles_headers, SlowRetrievalError, "no answer in", id="a header now and then"),
        pytest.param(redirects("file:///etc/passwd"), DownloadHTTPError, "not allowed", id="redirected to a file"),
        pytest.param(redirects("/layers/a"), DownloadHTTPError, "loop", id="redirected in circles"),
    ],
)
def test_given_up_within_the_limits(
    serve: Callable[..., Server], answer: Answer, error: type[Exception], text: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=text):
        fetched(serve(answer))
    assert time.monotonic() - began < 2


def test_a_refused_connection_is_tried_again_and_then_given_up() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(DownloadError, match="refused, 3 times"):
        list(Fetcher(Web(f"http://127.0.0.1:{port}", QUICK), QUICK).chunks("a", 0))


def test_an_endless_file_is_read_no_further_than_it_may_be(serve: Callable[..., Server]) -> None:
    fetcher = Fetcher(Web(serve(endless).url, QUICK), QUICK)
    with pytest.raises(DownloadError, match="exceeding"):
        fetcher.download_bytes("a", 100_000)


def test_cut_ends_a_read_that_waits(serve: Callable[..., Server]) -> None:
    limits = Limits(silence=timedelta(seconds=60))
    web = Web(serve(silent).url, limits)
    chunks = Fetcher(web, limits).chunks("a", 0)
    next(chunks)
    threading.Timer(0.1, web.cut).start()
    began = time.monotonic()
    with pytest.raises(DownloadError, match="broken off"):
        list(chunks)
    assert time.monotonic() - began < 1
    with pytest.raises(DownloadError, match="broken off"):
        list(web.read("a", 0))


@pytest.mark.parametrize(
    ("arrivals", "slow"),
    [
        pytest.param([(10, 0.1), (10, 0.9)], False, id="the first window is not over"),
        pytest.param([(99, 0.9), (0, 1.1)], True, id="too few in the first window"),
        pytest.param([(100, 0.9), (0, 1.1)], False, id="just enough"),
        pytest.param([(10_000, 1.0), (1, 2.5)], True, id="plenty at first does not count later"),
        pytest.param([(100, 1.0), (100, 2.0), (100, 3.0)], False, id="enough in each"),
    ],
)
def test_the_pace_is_judged_window_by_window(arrivals: list[tuple[int, float]], slow: bool) -> None:
    pace = Pace(Limits(window=timedelta(seconds=1), window_bytes=100), now=0.0)
    for count, now in arrivals[:-1]:
        pace.note(count, now)
    if slow:
        with pytest.raises(SlowRetrievalError):
            pace.note(*arrivals[-1])
    else:
        pace.note(*arrivals[-1])


def test_a_directory_gives_nothing_from_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "repository").mkdir()
    with pytest.raises(DownloadHTTPError):
        list(Directory(tmp_path / "repository").read("../secret", 0))


@pytest.mark.parametrize(
    ("repository", "address"),
    [
        ("/srv/tuf/", "file:///srv/tuf"),
        ("file:///srv/tuf", "file:///srv/tuf"),
        ("https://dl.example.org/tuf/", "https://dl.example.org/tuf"),
    ],
)
def test_a_repository_has_one_address(repository: str, address: str) -> None:
    assert address_of(repository) == address


# The whole client, over HTTP


def repository_server(out: Path, *, fail: dict[str, list[Answer]] | None = None) -> Answer:
    """Serves a directory, ranges included; the first requests for paths that end as in `fail` go as written there."""
    planned = {end: list(answers) for end, answers in (fail or {}).items()}

    def answer(connection: socket.socket, path: str, offset: int) -> None:
        for end, answers in planned.items():
            if path.endswith(end) and answers:
                return answers.pop(0)(connection, path, offset)
        try:
            content = (out / path.lstrip("/")).read_bytes()
        except OSError:
            return says("404 Not Found")(connection, path, offset)
        if offset:
            span = f"bytes {offset}-{len(content) - 1}/{len(content)}"
            connection.sendall(
                head("206 Partial Content", len(content) - offset, Content_Range=span) + content[offset:]
            )
        else:
            connection.sendall(head(length=len(content)) + content)
        return None

    return answer


def test_a_release_is_downloaded_over_http(serve: Callable[..., Server], publisher: Publisher, host: Host) -> None:
    server = serve(repository_server(publisher.out))
    images = host.download(server.url)
    assert images.name == "images.v20260725.0.json"
    assert f'"{server.url}?target=/layers/{{id}}.squashfs"' in images.read_text()
    assert host.layers() == {"base": b"debian" * 1000, "code-code": b"code"}


def half(content: bytes) -> Answer:
    """Promises all and sends the first half."""
    return lambda connection, path, offset: connection.sendall(head(length=len(content)) + content[: len(content) // 2])


def test_a_layer_that_broke_off_goes_on_where_it_was_also_in_the_next_attempt(
    serve: Callable[..., Server], publisher: Publisher, host: Host
) -> None:
    base = b"debian" * 1000
    failing = {".base.squashfs": [half(base), hangs_up, hangs_up]}
    server = serve(repository_server(publisher.out, fail=failing))
    with pytest.raises(Unavailable, match="3 times"):
        host.download(server.url)
    assert "base" not in host.layers() and host.files() == {}

    server.asked.clear()
    host.download(server.url)
    assert [offset for path, offset in server.asked if path.endswith(".base.squashfs")] == [3000]
    assert host.layers()["base"] == base
    assert not list((host.state / "tuf/parts").iterdir())


def test_a_beginning_from_somewhere_else_is_fetched_again(
    serve: Callable[..., Server], publisher: Publisher, host: Host
) -> None:
    failing = {".base.squashfs": [half(b"poison" * 1000), hangs_up, hangs_up]}
    server = serve(repository_server(publisher.out, fail=failing))
    with pytest.raises(Unavailable):
        host.download(server.url)
    host.download(server.url)
    assert host.layers()["base"] == b"debian" * 1000


@pytest.mark.parametrize(
    ("where", "answer", "reason"),
    [
        ("timestamp.json", endless, Reason.ENDLESS),
        ("timestamp.json", trickles, Reason.SLOW),
        ("timestamp.json", trickles_headers, Reason.SLOW),
        (".base.squashfs", endless, Reason.ENDLESS),
        (".base.squashfs", trickles, Reason.SLOW),
        (".base.squashfs", silent, Reason.SLOW),
    ],
)
def test_slow_and_endless_servers_are_refused(
    where: str, answer: Answer, reason: Reason, serve: Callable[..., Server], publisher: Publisher, host: Host
) -> None:
    server = serve(repository_server(publisher.out, fail={where: [answer] * 9}))
    with pytest.raises(Refused) as refusal:
        host.download(server.url)
    assert refusal.value.reason is reason
    assert host.files() == {}


def test_a_new_root_is_asked_for_and_its_absence_is_no_error(
    serve: Callable[..., Server], publisher: Publisher, host: Host
) -> None:
    server = serve(repository_server(publisher.out))
    host.download(server.url)
    assert ("/metadata/2.root.json", 0) in server.asked
    publisher.rotate("root")
    host.download(server.url)
    assert ("/metadata/3.root.json", 0) in server.asked


def test_a_server_that_fails_to_show_the_next_root_holds_the_host_up(
    serve: Callable[..., Server], publisher: Publisher, host: Host
) -> None:
    """Only "there is none" means that there is none: an error could hide a revocation."""
    server = serve(repository_server(publisher.out, fail={"2.root.json": [says("500 Oops")] * 9}))
    with pytest.raises(Unavailable):
        host.download(server.url)
