"""A raw byte connection, as both ends see it after an HTTP upgrade."""

from __future__ import annotations

import asyncio


class RawConnection:
    """Reads and writes bytes; closing it is the owner's duty (`async with` does it)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, limit: int = 65536) -> bytes:
        """Up to `limit` bytes as soon as there are any; b"" at the end, also when the other side broke off."""
        try:
            return await self._reader.read(limit)
        except (ConnectionError, OSError):
            return b""

    async def readexactly(self, count: int) -> bytes:
        """Raises EOFError (asyncio.IncompleteReadError) when the connection ends before."""
        try:
            return await self._reader.readexactly(count)
        except (ConnectionError, OSError) as error:
            raise EOFError(str(error)) from error

    def write(self, data: bytes) -> None:
        """Queue bytes; follow with `drain`, which waits while the other side is slow."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Raises ConnectionError when the other side is gone."""
        await self._writer.drain()

    def write_eof(self) -> None:
        """Half-close, where the transport can (TLS cannot)."""
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    async def wait_closed(self) -> None:
        try:
            async with asyncio.timeout(5):
                await self._writer.wait_closed()
        except (ConnectionError, OSError, TimeoutError):
            pass

    async def __aenter__(self) -> RawConnection:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.wait_closed()


async def splice(one: RawConnection, other: RawConnection) -> None:
    """Copy both ways until either side ends; the caller closes both."""

    async def copy(source: RawConnection, target: RawConnection) -> None:
        while data := await source.read():
            target.write(data)
            await target.drain()

    copies = [asyncio.ensure_future(copy(one, other)), asyncio.ensure_future(copy(other, one))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
