"""Nonsense to every endpoint of a real daemon that runs a job: each answer is well-formed, and nothing else happens.

The endpoints are the API's own table, so a new one is tried from its first day; it only has to say what body it takes.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flynn.host.api import Drain, HostApi
from flynn.host.client import HostClient
from flynn.host.joining import JoinRequest, TokenRequest
from flynn.http.server import Endpoint
from flynn.identity import Identity
from flynn.types.errors import BY_CODE, ValidationError
from flynn.types.host import (
    AttachReq,
    ContainerConfig,
    DiscoverdConfig,
    HostCommand,
    HostJob,
    JobStatus,
    Mountspec,
    NetworkConfig,
    ResourceCheck,
)
from flynn.types.sink import SinkInfo
from flynn.types.volume import ProviderSpec, PullCoordinate, VolumeRequest

from . import bodies
from .machine import META, TestMachine, eventually

pytestmark = [pytest.mark.root, pytest.mark.slow]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
SECONDS = 20.0
CODES = {**BY_CODE, ValidationError.code: ValidationError}

TAKES: dict[tuple[str, str], Any] = {
    ("PUT", "/host/jobs/{id}"): HostJob,
    ("PUT", "/host/jobs/{id}/signal/{signal}"): None,
    ("PUT", "/host/jobs/{id}/discoverd-deregister"): None,
    ("POST", "/attach"): AttachReq,
    ("POST", "/host/discoverd"): DiscoverdConfig,
    ("POST", "/host/network"): NetworkConfig,
    ("POST", "/host/resource-check"): ResourceCheck,
    ("POST", "/host/tags"): dict[str, str],
    ("POST", "/host/update"): HostCommand,
    ("POST", "/host/pull/images"): None,
    ("POST", "/host/pull/binaries"): None,
    ("POST", "/host/drain"): Drain,
    ("POST", "/host/tokens"): TokenRequest,
    ("POST", "/host/join"): JoinRequest,
    ("POST", "/storage/providers"): ProviderSpec,
    ("POST", "/storage/providers/{provider}/volumes"): VolumeRequest,
    ("PUT", "/storage/volumes/{id}/snapshot"): None,
    ("POST", "/storage/volumes/{id}/clone"): VolumeRequest,
    ("POST", "/storage/volumes/{id}/pull_snapshot"): PullCoordinate,
    ("GET", "/storage/volumes/{id}/send"): list[dict[str, str]],
    ("PUT", "/sinks/{id}"): SinkInfo,
}
"""What each endpoint is sent. An endpoint that changes something and is missing here fails the first test."""


def endpoints() -> list[Endpoint]:
    nobody = cast(Any, None)
    parts = ("node", "book", "runner", "attachments", "volumes", "sinks", "joining", "releases", "update")
    return HostApi(**dict.fromkeys(parts, nobody)).api().endpoints


def test_every_endpoint_that_changes_something_says_what_it_takes() -> None:
    table = {(one.method, one.path) for one in endpoints()}
    assert {pair for pair in table if pair[0] in ("PUT", "POST")} <= set(TAKES)
    assert set(TAKES) <= table


class Door:
    """The API by plain sockets, as another host: what is sent is what is written here, byte by byte."""

    def __init__(self, machine: TestMachine) -> None:
        self._address = (machine.ip, 1113)
        self._context = Identity.load(machine.state / "identity").client_context()
        self._kept: http.client.HTTPConnection | None = None

    def socket(self) -> ssl.SSLSocket:
        plain = socket.create_connection(self._address, timeout=SECONDS)
        return self._context.wrap_socket(plain, server_hostname=self._address[0])

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        """One well-formed request on a kept connection: status, content type, body (of a stream: its beginning)."""
        for attempt in (1, 2):
            if self._kept is None:
                self._kept = http.client.HTTPConnection(*self._address, timeout=SECONDS)
                self._kept.sock = self.socket()
            try:
                self._kept.request(method, path, body, headers or {})
                answer = self._kept.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                self._kept = None  # closed after the last answer
                if attempt == 2:
                    raise
        kind = answer.headers.get("Content-Type", "")
        if answer.status == 101 or kind.startswith("text/event-stream"):
            data = b""
            self._kept.close()
        else:
            data = answer.read()
        if answer.will_close or answer.status == 101 or kind.startswith("text/event-stream"):
            self._kept = None
        return answer.status, kind, data

    def json(self, path: str) -> Any:
        status, _, data = self.ask("GET", path)
        assert status == 200, data
        return json.loads(data)

    def send_raw(self, data: bytes, *, finish: bool) -> bytes:
        """Write bytes to a new connection, close our side or not, and return what comes until the end."""
        with self.socket() as stream:
            answer = b""
            try:
                stream.sendall(data)
                if finish:
                    stream.unwrap()
                stream.settimeout(SECONDS if finish else 0.3)
                while chunk := stream.recv(65536):
                    answer += chunk
            except (TimeoutError, OSError, ssl.SSLError):
                pass
            return answer

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


class Witness:
    """The running job, and everything the host remembers."""

    def __init__(self, door: Door, machine: TestMachine, job_id: str) -> None:
        self.door, self.machine, self.job_id = door, machine, job_id
        self.pid = door.json(f"/host/jobs/{job_id}")["pid"]
        self.daemon = machine.process

    def memory(self) -> Any:
        """What a refused request must not have changed."""
        status = self.door.json("/host/status")
        for name in ("disk", "volumes"):  # whose figures change by themselves
            status.pop(name, None)
        jobs = {key for key in self.door.json("/host/jobs")}
        return status, jobs, self.door.json("/storage/volumes"), self.door.json("/sinks")

    def check(self) -> None:
        assert self.daemon is not None and self.daemon.poll() is None, "the daemon died"
        job = self.door.json(f"/host/jobs/{self.job_id}")
        assert (job["status"], job["pid"]) == (JobStatus.RUNNING, self.pid)
        assert Path(f"/proc/{self.pid}").exists()


@pytest.fixture
async def door(machine: TestMachine, host: HostClient) -> AsyncIterator[Door]:
    door = Door(machine)
    yield door
    door.close()


@pytest.fixture
async def witness(door: Door, machine: TestMachine, host: HostClient, image: Mountspec) -> AsyncIterator[Witness]:
    """A job that counts on its standard output, every tenth of a second."""
    script = "n=0; while true; do echo $n; n=$((n+1)); sleep 0.1; done"
    job = HostJob(
        id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=ContainerConfig(args=["sh", "-c", script])
    )
    await host.add_job(job)

    async def runs() -> bool:
        return (await host.job(job.id)).status is JobStatus.RUNNING

    await eventually(runs)
    yield Witness(door, machine, job.id)
    await host.stop_job(job.id)


@pytest.fixture(autouse=True)
def nothing_unexpected(machine: TestMachine) -> Iterator[None]:
    """Nothing that comes over the wire may end in an exception nobody has thought of."""
    before = len(machine.console.read_text())
    yield
    said = machine.console.read_text()[before:]
    assert "Traceback" not in said, said[said.index("Traceback") - 500 :][:3000]


def check_answer(method: str, path: str, status: int, kind: str, body: bytes) -> None:
    """Every refusal says what it is, in the one form there is; nothing of the caller's making is a fault of ours."""
    told = f"{method} {path}: {status} {body[:300]!r}"
    if status in (200, 101, 301, 307):
        return
    if status == 404 and kind.startswith("text/plain"):
        assert body == b"404 page not found\n", told
        return
    if path == "/attach" and status == 400 and body == b"invalid JSON\n":
        return
    assert kind.startswith("application/json"), told
    error = json.loads(body)
    assert {"code", "message", "retry"} <= set(error) <= {"code", "message", "retry", "detail"}, told
    assert CODES[error["code"]].status == status, told
    assert status < 500 or (status == 503 and error["retry"] is True), told
    assert error["message"] and isinstance(error["message"], str), told
    if error["code"] == "validation_error" and not any(word in error["message"] for word in OF_THE_WHOLE):
        assert error["detail"]["field"], told


OF_THE_WHOLE = ("Content-Type", "must be able to accept", "Expected `", "cannot be sent", "can be cloned")
"""Refusals that are about no field of the body."""
RATE_LIMITED = ("/host/join",)  # five wrong tries a minute
SINK = b'{"kind":"syslog","config":{"url":"syslog://127.0.0.1:1"}}'
CONTENT_TYPES = ("application/json", "application/json", "application/json; charset=utf-8", "text/plain", "", "x")
SAFE_SIGNALS = ("0", "-1", "65", "28", "9" * 30, "x", "1.5", "%EF%BC%91", "0x9", "", "%00", "9%00")


shaped_commands = bodies.shaped(HostCommand).map(lambda command: {**command, "path": command.get("path") or "/none"})


@st.composite
def requests(
    draw: st.DrawFn, endpoint: Endpoint, job_id: str, image: Mountspec
) -> tuple[str, str, bytes | None, dict[str, str]]:
    """A method, a path with its query, a body and headers for one endpoint."""
    path = endpoint.path
    for name in ("id", "signal", "provider"):
        if f"{{{name}}}" not in path:
            continue
        words = [quote(text, safe="") for text in bodies.ODD_TEXTS] + ["node1-x"]
        if name == "signal":
            words = list(SAFE_SIGNALS)
        if name == "provider":
            words += ["default"] * 80
        if name == "id" and path.startswith("/host/jobs") and endpoint.method != "DELETE":
            words += [job_id] * 20
        if name == "id" and not path.startswith("/host/jobs"):
            words += ["fuzz-1", "fuzz-2"] * 20
        path = path.replace(f"{{{name}}}", draw(st.sampled_from(words)))
    kind = TAKES.get((endpoint.method, endpoint.path))
    body: bytes | None = None
    if (endpoint.method, endpoint.path) in TAKES:
        choices = [bodies.raw_bodies(kind)]
        if kind is HostCommand:  # never one without a path, which would replace the daemon
            choices = [bodies.spoiled(shaped_commands).map(bodies.written), shaped_commands.map(bodies.written)]
        elif kind is HostJob:
            choices += [nearly_good_jobs(image)] * 3
        elif kind is not None:
            choices += [bodies.shaped(kind).map(bodies.written)]
        body = draw(st.one_of(choices))
    query = draw(st.sampled_from(["", "", "", "?active=true", "?active=%FF", "?a=b&a=c", "?" + "x" * 2000, "?%zz"]))
    if endpoint.path.startswith("/host/pull/") and draw(st.booleans()):
        version = draw(st.sampled_from(["", "%00", "v1"]))
        query = f"?repository={quote(draw(st.sampled_from(bodies.ODD_TEXTS)))}&version={version}"
    headers = {"Content-Type": draw(st.sampled_from(CONTENT_TYPES))} if body is not None else {}
    if draw(st.integers(0, 3)) == 0:
        accepted = ["text/event-stream", "application/vnd.zfs.snapshot-stream", "*/*", "x" * 1000]
        headers["Accept"] = draw(st.sampled_from(accepted))
        headers["Last-Event-ID"] = draw(st.sampled_from(["0", "-1", "x", "9" * 50, "1"]))
    return endpoint.method, path + query, body, headers


@st.composite
def nearly_good_jobs(draw: st.DrawFn, image: Mountspec) -> bytes:
    """Jobs that could run `true`, were it not for one or two things."""
    good = json.loads(bodies.written({"mountspecs": [json.loads(_json(image))], "config": {"args": ["true"]}}))
    odd = draw(bodies.shaped(HostJob))
    for key in draw(st.lists(st.sampled_from(sorted(set(odd) - {"config", "id"}) or ["x"]), max_size=1)):
        good[key] = odd.get(key)
    config = draw(bodies.shaped(ContainerConfig))
    for key in draw(st.lists(st.sampled_from(sorted(config) or ["x"]), max_size=2)):
        good["config"][key] = config.get(key)
    if draw(st.booleans()):
        good = draw(bodies.spoiled(st.just(good)))
    return bodies.written(good)


def _json(value: Any) -> bytes:
    from flynn.types.codec import encode

    return encode(value)


@pytest.mark.parametrize(
    "endpoint",
    [pytest.param(one, id=f"{one.method} {one.path}") for one in endpoints() if one.path not in RATE_LIMITED],
)
async def test_no_body_in_no_place_does_harm(endpoint: Endpoint, witness: Witness, image: Mountspec) -> None:
    door = witness.door
    door.ask("POST", "/storage/providers/default/volumes", b'{"id":"fuzz-1"}')
    door.ask("PUT", "/sinks/fuzz-1", SINK, {"Content-Type": "application/json"})

    @FUZZ
    @given(requests(endpoint, witness.job_id, image))
    def attempt(request: tuple[str, str, bytes | None, dict[str, str]]) -> None:
        method, path, body, headers = request
        before = witness.memory()
        status, kind, answer = door.ask(method, path, body, headers)
        check_answer(method, path.partition("?")[0], status, kind, answer)
        after = witness.memory()
        if status >= 400:
            changed = [a for a, b in zip(after, before, strict=True) if a != b]
            assert not [1 for a, b in zip(after, before, strict=True) if a != b and not isinstance(a, set)], changed
            assert after[1] <= before[1], changed  # jobs may retire meanwhile
        for job_id in after[1] - before[1] - {witness.job_id}:
            if door.json(f"/host/jobs/{quote(job_id, safe='')}")["job"].get("resurrect"):
                door.ask("DELETE", f"/host/jobs/{quote(job_id, safe='')}")

    attempt()
    witness.check()
    for job_id, job in door.json("/host/jobs?active=true").items():
        assert job_id == witness.job_id or job.get("status", 0) <= 1
        if job_id != witness.job_id:
            assert door.ask("DELETE", f"/host/jobs/{quote(job_id, safe='')}")[0] == 200
    witness.check()


HEADS = (
    b"GET /host/status HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /host/jobs/node1-raw HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n"
    b'{"mountspecs":[{"type":"squashfs"}]}    ',
    b"POST /host/tags HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'7\r\n{"a":"b\r\n3\r\n"} \r\n0\r\n\r\n',
    b"POST /attach HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: flynn-attach/0\r\n"
    b"Content-Type: application/json\r\nContent-Length: 36\r\n\r\n"
    b'{"job_id":"node1-nobody","flags":23}\x03\x00\x00\x00\x00\x01x\x04\x00\x00\x00\x0f',
    b"POST /attach HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /host/jobs HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n",
    b"DELETE /host/jobs/node1-nobody HTTP/1.1\r\nHost: x\r\n\r\n",
)
"""Whole requests, to be cut, mixed and damaged."""
SPLICES = (
    b"\0", b"\r\n", b"\n\n", b"\xff" * 8, b"HTTP/9.9", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: x\r\n", b"../",
    b"%", b"?", b"//", b" ", b"X: " + b"y" * 20000 + b"\r\n", b"ffffffffffffffffff\r\n", b"PRI * HTTP/2.0\r\n\r\n",
)  # fmt: skip


@st.composite
def broken_streams(draw: st.DrawFn) -> bytes:
    """One request or two behind each other, with pieces missing, added or doubled."""
    data = b"".join(draw(st.lists(st.sampled_from(HEADS), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 2)):
            case 0:
                data = data[:at] + draw(st.sampled_from(SPLICES)) + data[at:]
            case 1:
                data = data[:at] + data[at + draw(st.integers(1, 30)) :]
            case 2:
                data = data[:at]
    return data


async def test_no_bytes_on_a_connection_do_harm(witness: Witness) -> None:
    """Truncated bodies, two requests that overlap, upgrades that are none: refused or hung up on, nothing else."""
    door = witness.door

    @FUZZ
    @given(broken_streams(), st.booleans())
    def attempt(data: bytes, finish: bool) -> None:
        answer = door.send_raw(data, finish=finish)
        assert b" 500 " not in answer.partition(b"\r\n")[0], answer
        assert b"Traceback" not in answer
        if answer and not answer.startswith((b"\0", b"\1", b"\2")):
            assert answer.startswith(b"HTTP/"), answer  # a request without a version is one of 0.9

    attempt()
    witness.check()


async def test_a_body_that_never_comes_holds_nobody_up(witness: Witness) -> None:
    """Two hundred half-sent requests at once, and the host answers as ever."""
    door = witness.door
    held = []
    try:
        for _ in range(200):
            stream = door.socket()
            stream.sendall(b"PUT /host/jobs/node1-x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            held.append(stream)
        witness.check()
    finally:
        for stream in held:
            stream.close()
    witness.check()
