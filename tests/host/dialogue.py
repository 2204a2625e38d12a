"""Attach dialogues as text, played against a real daemon over a plain connection in its network, byte by byte.

# what it is about
job stdin disable_log: sh script          the job (its options before the colon); `again` takes the one before
one attach 23 24x80                       `one` asks: flags, size of the terminal; the answer's head must be exact
one attach 23 "bytes" 00 01               ... with bytes right behind the request
one attach eventually 23                  ... once the host has noticed that another one has left
run                                       the job is added
up / down / wait "text"                   wait until it runs, is down, has logged the text
stop                                      DELETE
one -> 03 00 00000001 "x"                 one sends: hex and quoted text
one <- 01 00                              one gets exactly this
one <= 1 "text"                           one gets data frames of stream 1 that come to this text
one end                                   the host closes
one leaves / one half-closes              the client does
status crashed 143 "error"                the record of the job
one request GET /ping                     a plain request on the connection before, answered with 200
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import re
import socket
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from flynn.host import attach
from flynn.host.client import HostClient
from flynn.types.host import AttachFlag, AttachReq, ContainerConfig, HostJob, JobStatus, Mountspec
from flynn.types.resources import Limit

from .machine import META, TestMachine, ended, eventually

SCENARIOS = Path(__file__).parent / "scenarios" / "attach"
SECONDS = 20.0
HEAD = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: flynn-attach/0\r\n\r\n"
CLONE_NEWNET = 0x40000000


def connect_inside(namespace: str, port: int = 1113) -> socket.socket:
    """A connection to the loopback of a network namespace, made by a thread that ends with it."""
    made: list[socket.socket] = []

    def enter() -> None:
        descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) == 0:
            made.append(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
        os.close(descriptor)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    made[0].setblocking(False)
    return made[0]


def raw(words: list[str]) -> bytes:
    """Hex digits, and text that was quoted (which begins with a quote still)."""
    return b"".join(
        word[1:-1].encode().decode("unicode_escape").encode("latin-1") if word.startswith('"') else bytes.fromhex(word)
        for word in words
    )


def split(text: str) -> list[str]:
    """Words; quoted ones keep their quotes."""
    return re.findall(r'"(?:\\.|[^"\\])*"|\S+', text)


@dataclass
class Dialogue:
    machine: TestMachine
    host: HostClient
    image: Mountspec
    job: HostJob | None = None
    peeked: dict[str, bytes] = field(default_factory=dict)  # what was read too early
    ends: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=dict)

    async def play(self, text: str) -> None:
        try:
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip() or line.startswith("#"):
                    continue
                try:
                    async with asyncio.timeout(SECONDS):
                        await self._step(line)
                except (AssertionError, TimeoutError, EOFError, OSError) as error:
                    raise AssertionError(f"line {number}: {line}\n{error!r}") from error
        finally:
            for _, writer in self.ends.values():
                writer.close()
            if self.job is not None:
                await self.host.stop_job(self.job.id)

    async def _step(self, line: str) -> None:
        first, _, rest = line.partition(" ")
        match first.split(":")[0]:
            case "job":
                options, _, script = line.removeprefix("job").partition(":")
                self.job = self._job(options.split(), script.strip())
            case "run":
                await self.host.add_job(self._known)
            case "up":
                await eventually(lambda: self._is(JobStatus.RUNNING))
            case "down":
                await ended(self.host, self._known.id)
                await self.host.stop_job(self._known.id)  # which waits until all is cleaned up
            case "stop":
                await self.host.stop_job(self._known.id)
            case "wait":
                await eventually(lambda: self._logged(rest.strip().strip('"')))
            case "status":
                await self._check_status(split(rest))
            case _:
                await self._of_client(first, split(rest))

    @property
    def _known(self) -> HostJob:
        assert self.job is not None
        return self.job

    def _job(self, options: list[str], script: str) -> HostJob:
        flags = {name: True for name in options if name in ("tty", "stdin", "disable_log")}
        config = ContainerConfig(args=["sh", "-c", script], **flags)  # type: ignore[arg-type]
        memory = {"memory": Limit(limit=32 << 20)} if "small" in options else {}
        partition = "nowhere" if "misplaced" in options else ""
        return HostJob(
            id=f"node1-{uuid.uuid4()}", mountspecs=[self.image], metadata=META, config=config, resources=memory,
            partition=partition,
        )  # fmt: skip

    async def _is(self, status: JobStatus) -> bool:
        return (await self.host.job(self._known.id)).status is status

    async def _logged(self, text: str) -> bool:
        flags = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.LOGS | AttachFlag.INIT_LOG
        seen = b""
        async with self.host.attach(AttachReq(job_id=self._known.id, flags=flags)) as attachment:
            async for frame in attachment.frames():
                if isinstance(frame, attach.Data):
                    seen += frame.data
        return text.encode() in seen

    async def _check_status(self, words: list[str]) -> None:
        job = await self.host.job(self._known.id)
        found = [job.status.name.lower()]
        if len(words) > 1:
            found.append(str(job.exit_status))
        if len(words) > 2:
            assert words[2].strip('"') in (job.error or ""), job.error
        assert found == words[:2]

    async def _of_client(self, name: str, words: list[str]) -> None:
        match words[0]:
            case "attach":
                await self._attach(name, words[1:])
            case "request":
                await self._request(name, words[1], words[2])
            case "->":
                self.ends[name][1].write(raw(words[1:]))
                await self.ends[name][1].drain()
            case "<-":
                wanted = raw(words[1:])
                got = await self._exactly(name, len(wanted))
                assert got == wanted, f"got {got.hex(' ')} {got!r}"
            case "<=":
                await self._frames(name, int(words[1]), raw(words[2:]))
            case "end":
                rest = await self.ends[name][0].read(1000)
                assert rest == b"", f"got {rest.hex(' ')} {rest!r}"
            case "leaves":
                self.ends[name][1].close()
            case "half-closes":
                self.ends[name][1].write_eof()
            case other:
                raise AssertionError(f"no such step: {other}")

    async def _exactly(self, name: str, count: int) -> bytes:
        early = self.peeked.pop(name, b"")
        try:
            return early + await self.ends[name][0].readexactly(count - len(early))
        except asyncio.IncompleteReadError as error:
            raise AssertionError(f"only got {error.partial.hex(' ')} {error.partial!r}") from error

    async def _frames(self, name: str, stream: int, wanted: bytes) -> None:
        seen = b""
        while len(seen) < len(wanted):
            head = await self._exactly(name, 6)
            assert head[:2] == bytes((3, stream)), f"got {head.hex(' ')} after {seen!r}"
            seen += await self._exactly(name, int.from_bytes(head[2:], "big"))
        assert seen == wanted

    async def _open(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if name not in self.ends:
            sock = await asyncio.to_thread(connect_inside, self.machine.name)
            self.ends[name] = await asyncio.open_connection(sock=sock)
        return self.ends[name]

    def _head(self, method: str, path: str, more: str, body: bytes) -> bytes:
        key = base64.b64encode(b":" + (self.machine.config / "host.key").read_bytes().strip()).decode()
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {key}\r\n{more}{length}\r\n".encode() + body
        )

    async def _attach(self, name: str, words: list[str]) -> None:
        asked = list(words)
        if patient := words[0] == "eventually":
            words.pop(0)
        reader, writer = await self._open(name)
        request: dict[str, object] = {"job_id": self._known.id, "flags": int(words.pop(0))}
        if words and "x" in words[0] and not words[0].startswith('"'):
            height, _, width = words.pop(0).partition("x")
            request |= {"height": int(height), "width": int(width)}
        upgrade = "Content-Type: application/json\r\nConnection: upgrade\r\nUpgrade: flynn-attach/0\r\n"
        writer.write(self._head("POST", "/attach", upgrade, json.dumps(request).encode()) + raw(words))
        await writer.drain()
        assert await reader.readuntil(b"\r\n\r\n") == HEAD
        if patient:
            self.peeked[name] = await reader.readexactly(1)
            if self.peeked[name] == b"\2":  # the host has not noticed yet that the one before has left
                self.peeked.pop(name)
                self.ends.pop(name)[1].close()
                await asyncio.sleep(0.05)
                await self._attach(name, asked)

    async def _request(self, name: str, method: str, path: str) -> None:
        reader, writer = await self._open(name)
        writer.write(self._head(method, path, "", b""))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
