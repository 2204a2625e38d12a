"""HAProxy's log, one datagram per request, as log lines of the router. The format is fixed in `render`.

HAProxy never waits for us: a datagram that finds nobody, or a full socket, is gone. Above a rate that `render` sets,
requests are counted but not logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_FIELDS = 14
_ABSENT = ("-", "<NOSRV>", "")


@dataclass(frozen=True, slots=True)
class Line:
    """One request, or one connection of a TCP route (then the HTTP fields are empty)."""

    client: str
    frontend: str
    service: str
    addr: str
    status: int
    duration_ms: int
    bytes: int
    termination: str  # HAProxy's two letters: who ended it, in which phase
    retries: int
    request_id: str = ""
    method: str = ""
    host: str = ""
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Line | None:
        """None for what is not an access line (HAProxy also logs its own starts and stops)."""
        words = text.strip().split(" ", _FIELDS - 1)
        if len(words) != _FIELDS or not words[1].lstrip("+-").isdigit() or not words[6].isdigit():
            return None
        _, duration, client, frontend, backend, server, size, termination, retries, status, rid, method, host, path = (
            "" if word in _ABSENT else word for word in words
        )
        pool = backend.removeprefix("raw:").split(":")
        return cls(
            client=client,
            frontend=frontend.rstrip("~"),
            service=pool[1] if len(pool) > 1 else "",
            addr=server.removesuffix(".tls"),
            status=int(status) if status.isdigit() else 0,
            duration_ms=int(duration.lstrip("+")),
            bytes=int(size),
            termination=termination,
            retries=int(retries.lstrip("+") or 0),
            request_id=rid,
            method=method,
            host=host,
            path=path,
        )


def write(line: Line, job_id: str = "") -> None:
    """A failure to serve is an error, everything else information."""
    fields = {
        "service": line.service,
        "request_id": line.request_id,
        "client_addr": line.client,
        "host": line.host,
        "path": line.path,
        "method": line.method,
        "status": line.status or "",
        "job.id": job_id,
        "addr": line.addr,
        "bytes": line.bytes,
        "retries": line.retries or "",
        "duration": f"{line.duration_ms}ms",
        "end": "" if line.termination == "--" else line.termination,
    }
    present = {key: value for key, value in fields.items() if value != ""}
    if line.frontend.startswith("tcp."):
        log.info("connection closed", extra={"proxy": "tcp", **present})
    elif line.status == 503 and line.termination[:1] in ("S", "s"):  # HAProxy's own answer, not a backend's
        log.error("request failed", extra=present)
    else:
        log.info("request complete", extra=present)


class _Receiver(asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: object) -> None:
        text = data.decode(errors="replace")
        line = Line.parse(text)
        if line is not None:
            write(line)
        elif text.strip():
            log.info("haproxy", extra={"text": text.strip()})


@asynccontextmanager
async def receiving(path: Path) -> AsyncIterator[None]:
    """Log what arrives at the socket while the block is open."""
    path.unlink(missing_ok=True)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    os.chmod(path, 0o600)
    receiver.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(_Receiver, sock=receiver)
    try:
        yield
    finally:
        transport.close()
        path.unlink(missing_ok=True)
