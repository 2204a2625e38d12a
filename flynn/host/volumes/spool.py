"""What is received goes into a file without a name first: a stream that breaks off leaves and touches nothing."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from flynn.host.jobs.room import default_reserve, mib
from flynn.host.volumes.provider import Unavailable

LOOK_EVERY_BYTES = 16 << 20


@asynccontextmanager
async def spooled(stream: AsyncIterator[bytes], directory: Path) -> AsyncIterator[IO[bytes]]:
    """Give the whole stream as a file, at its beginning.

    Raises:
        Unavailable: the disk would go below what is held in reserve.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        received, looked = 0, -LOOK_EVERY_BYTES
        async for chunk in stream:
            if received - looked >= LOOK_EVERY_BYTES:
                looked = received
                usage = await asyncio.to_thread(shutil.disk_usage, directory)
                if usage.free - LOOK_EVERY_BYTES < default_reserve(usage.total):
                    raise Unavailable(f"no room to receive it: {directory} has {mib(usage.free)} free")
            await asyncio.to_thread(file.write, chunk)
            received += len(chunk)
        await asyncio.to_thread(file.flush)
        file.seek(0)
        yield file
