"""What our configuration costs: small requests through it, beside a HAProxy that does nothing but pass them on.

Same binary, same threads, same backend, keep-alive connections from wrk on loopback. Ours looks up its route among
a hundred apps, adds the forwarding headers and a request id, and counts. Rounds alternate, because the machine's
speed changes under us; the medians are reported.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.rows import Row, table
from flynn.router.render import Settings, render
from flynn.router.table import ServiceState, build
from flynn.types.instance import Instance
from flynn.types.route import Route

ROUNDS = 7
SECONDS = 2
CONNECTIONS = 32
APPS = 100
HOST = "app42.example.test"
MIN_REQUESTS_RATIO = 0.9
MAX_P99_RATIO = 1.2

BACKEND = """
global
    nbthread 1
    maxconn 2000
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
frontend backend
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string "hello from the app\\n"
"""

BARE = """
global
    nbthread 2
    maxconn 2000
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
frontend bare
    bind 127.0.0.1:{port}
    default_backend app
backend app
    server app 127.0.0.1:{backend}
"""


def rows() -> list[Row]:
    work = Path(tempfile.mkdtemp(prefix="fb-"))
    try:
        with contextlib.ExitStack() as stack:
            backend, bare = _free_port(), _free_port()
            stack.enter_context(_haproxy(_written(work / "backend.cfg", BACKEND.format(port=backend))))
            stack.enter_context(_haproxy(_written(work / "bare.cfg", BARE.format(port=bare, backend=backend))))
            ours = stack.enter_context(_router(work, backend))
            return _measure(ours, bare)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(ours: int, bare: int) -> list[Row]:
    for port in (ours, bare):
        _load(port)  # warm: memory, caches, idle connections
    found: dict[int, list[tuple[float, float]]] = {ours: [], bare: []}
    for number in range(ROUNDS):
        for port in (ours, bare) if number % 2 else (bare, ours):
            found[port].append(_load(port))
    rate = {port: statistics.median(requests for requests, _ in samples) for port, samples in found.items()}
    p99 = {port: statistics.median(latency for _, latency in samples) for port, samples in found.items()}
    return [
        Row(
            name="router: small requests",
            ours=rate[ours],
            peer=rate[bare],
            unit="requests/s",
            budget=1 / MIN_REQUESTS_RATIO,
            against="bare HAProxy",
        ),
        Row(
            name="router: small requests, p99",
            ours=p99[ours],
            peer=p99[bare],
            unit="ms",
            budget=MAX_P99_RATIO,
            against="bare HAProxy",
        ),
    ]


def _load(port: int) -> tuple[float, float]:
    """Requests per second and the 99th percentile in milliseconds. Every answer has to be a good one."""
    report = subprocess.run(
        [
            "wrk",
            "-t1",
            f"-c{CONNECTIONS}",
            f"-d{SECONDS}s",
            "--latency",
            "-H",
            f"Host: {HOST}",
            f"http://127.0.0.1:{port}/",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        raise RuntimeError(f"requests failed:\n{report}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", report)
    latency = re.search(r"99%\s+([\d.]+)(us|ms|s)", report)
    assert rate is not None and latency is not None, report
    return float(rate[1]), float(latency[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[latency[2]]


@contextlib.contextmanager
def _router(work: Path, backend: int) -> Iterator[int]:
    port = _free_port()
    instance = Instance.at(f"127.0.0.1:{backend}", "http")
    routes = [
        Route(type="http", id=str(n), domain=f"app{n}.example.test", service=f"app{n}-web", drain_backends=True)
        for n in range(APPS)
    ]
    services = {route.service: ServiceState((instance,)) for route in routes}
    settings = Settings(
        listen_ip="127.0.0.1", http_port=port, https_port=_free_port(), cookie_key=bytes(32), max_connections=2000
    )
    for name, content in render(build(routes, services), settings).files(str(work), str(work)).items():
        (work / name).write_bytes(content)
    with _log_reader(work / "log.sock"), _haproxy(work / "haproxy.cfg"):
        yield port


@contextlib.contextmanager
def _log_reader(path: Path) -> Iterator[None]:
    """Takes HAProxy's log, as the daemon does."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    receiver.settimeout(0.2)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                receiver.recv(4096)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        receiver.close()


@contextlib.contextmanager
def _haproxy(config: Path) -> Iterator[None]:
    process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    port = int(re.findall(r"bind 127\.0\.0\.1:(\d+)", config.read_text())[0])
    deadline = time.monotonic() + 5
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"HAProxy does not start on {config}")
        yield
    finally:
        process.terminate()
        process.wait()


def _written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    print(table(rows()))
