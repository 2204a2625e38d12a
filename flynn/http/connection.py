"""A raw byte connection, as both ends see it after an HTTP upgrade."""

from __future__ import annotations

import asyncio
import ssl as tls

BUFFER_BYTES = 256 * 1024
LINGER_SECONDS = 2.0


class LastWordsReader(asyncio.StreamReader):
    """A reader that gives out what has arrived before it reports that the connection was reset.

    A peer that closes while we still send to it (the end of standard input, say) resets the connection; what it said
    before is valid all the same, and the plain StreamReader would throw it away.
    """

    def set_exception(self, exc: BaseException) -> None:
        self.feed_eof()


async def open_raw(
    host: str, port: int, *, ssl: tls.SSLContext | None, server_hostname: str | None
) -> tuple[LastWordsReader, asyncio.StreamWriter]:
    """Like `asyncio.open_connection`, with a reader that survives a reset."""
    loop = asyncio.get_running_loop()
    reader = LastWordsReader(limit=BUFFER_BYTES, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, host, port, ssl=ssl, server_hostname=server_hostname)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


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

    @property
    def closing(self) -> bool:
        """Nothing can be written any more. With TLS that is so once the other side has closed."""
        return self._writer.transport.is_closing()

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


class ServedConnection(RawConnection):
    """The server's end. When it is left, the client closes first.

    Closing while the client still sends (the end of its standard input, say) would reset the connection, and what the
    client has not read yet would be lost with it. So the rest of its input is read and dropped, for a bounded time.
    """

    async def __aexit__(self, *exc: object) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self.drain()
                self.write_eof()
                while await self.read():
                    pass
        except (ConnectionError, TimeoutError):
            pass
        await super().__aexit__(*exc)


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
