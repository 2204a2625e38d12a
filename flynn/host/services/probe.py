"""One probe of a port: connect, or ask for a page.

A few lines of HTTP/1.1 of our own, because the answer is only sniffed at.
"""

from __future__ import annotations

import asyncio
import ssl

from flynn.host.services.health import PROBE_TIMEOUT, Check

MATCH_BYTES = 5120  # how much of a body is searched
HEAD_BYTES = 32 << 10


async def succeeds(check: Check, host: str, port: int) -> bool:
    """Probe once, for at most `PROBE_TIMEOUT`; every failure is just False."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT.total_seconds()):
            if check.type == "tcp":
                return await _connects(host, port)
            return await _answers(check, host, port)
    except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError):
        return False


async def _connects(host: str, port: int) -> bool:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    return True


async def _answers(check: Check, host: str, port: int) -> bool:
    tls = _unverified() if check.type == "https" else None
    name = check.host or host
    reader, writer = await asyncio.open_connection(
        host, port, ssl=tls, server_hostname=name if tls else None, limit=HEAD_BYTES
    )
    try:
        head = f"GET {check.path} HTTP/1.1\r\nHost: {check.host or f'{host}:{port}'}\r\n"
        writer.write((head + "User-Agent: flynn-host\r\nConnection: close\r\n\r\n").encode())
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
        if status != check.status:
            return False
        return not check.match or check.match.encode() in await _up_to(reader, MATCH_BYTES)
    finally:
        writer.close()


async def _up_to(reader: asyncio.StreamReader, limit: int) -> bytes:
    body = b""
    while len(body) < limit and (chunk := await reader.read(limit - len(body))):
        body += chunk
    return body


def _unverified() -> ssl.SSLContext:
    """Nobody issues certificates for container addresses: reachability is what is asked."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
