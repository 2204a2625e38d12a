"""Image layers on this host: fetched once, verified before they are mounted for the first time, kept by id.

`<state>/layers/<id>.squashfs`; a file under its final name is complete and verified. Mounting is the runtime's affair.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from flynn.aio.supervisor import TaskSet
from flynn.host.runtime.layers import LayerError, verify
from flynn.http.client import HttpClient
from flynn.types.errors import ApiError
from flynn.types.host import Mountspec

log = logging.getLogger(__name__)

FETCH_TRIES = 3
FETCH_SILENCE_SECONDS = 60.0
CHUNK_BYTES = 1 << 20
COLLECT_EVERY = timedelta(hours=1)
UNUSED = timedelta(days=7)
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file

ClientFor = Callable[[str], Awaitable[HttpClient]]


class LayerStore:
    """The layers of one host. `client_for` makes the client of a base URL (the blobstore wants our certificate)."""

    def __init__(self, directory: Path, client_for: ClientFor, tasks: TaskSet) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory, self._client_for, self._tasks = directory, client_for, tasks
        self._running: dict[str, asyncio.Task[Path | LayerError]] = {}
        for leftover in directory.glob(".*.part"):
            leftover.unlink()

    def path(self, layer_id: str) -> Path:
        return self._directory / f"{layer_id}.squashfs"

    async def ensure(self, spec: Mountspec) -> Path:
        """Return the verified file of a layer, importing it if need be; concurrent callers share one import.

        A caller that gives up does not end the import for the others.

        Raises:
            LayerError: it cannot be fetched, or is not what its hashes and size say.
        """
        if spec.type != "squashfs":
            raise LayerError(f'unknown mountspec type: "{spec.type}"')
        if not spec.id or "/" in spec.id or spec.id.startswith("."):
            raise LayerError(f"invalid layer id {spec.id!r}")
        target = self.path(spec.id)
        if target.exists():
            os.utime(target)  # see `collect`
            return target
        task = self._running.get(spec.id)
        if task is None:
            task = self._tasks.start(f"import layer {spec.id}", self._import(spec, target))
            self._running[spec.id] = task
            task.add_done_callback(lambda _: self._running.pop(spec.id, None))
        outcome = await asyncio.shield(task)
        if isinstance(outcome, LayerError):
            raise LayerError(str(outcome))
        return outcome

    async def collect(self, in_use: Callable[[], Collection[str]]) -> NoReturn:
        """Delete layers that no listed job has and nobody has asked for in `UNUSED`, for ever."""
        while True:
            await asyncio.sleep(COLLECT_EVERY.total_seconds())
            for file in self._directory.glob("*.squashfs"):
                idle = time.time() - file.stat().st_mtime
                if idle > UNUSED.total_seconds() and file.stem not in in_use():
                    file.unlink(missing_ok=True)
                    log.info("layer deleted, nobody has used it lately", extra={"layer": file.stem})

    async def _import(self, spec: Mountspec, target: Path) -> Path | LayerError:
        """Fetch, verify, rename. Errors are returned, not raised: the task belongs to several callers."""
        part = self._directory / f".{spec.id}.part"
        try:
            if spec.size <= 0:
                raise LayerError(f"layer {spec.id} has no size")
            url = urlsplit(spec.url)
            if url.scheme == "file":
                await asyncio.to_thread(_copy, Path(unquote(url.path)), part)
            elif url.scheme in ("http", "https"):
                await self._download(spec, part)
            else:
                raise LayerError(f"layer {spec.id} has the unknown kind of URL {spec.url!r}")
            await asyncio.to_thread(verify, part, spec.hashes, spec.size)
            await asyncio.to_thread(_settle, part, target)
            log.info("layer imported", extra={"layer": spec.id, "bytes": spec.size, "url": spec.url})
        except (OSError, ApiError, LayerError) as error:
            part.unlink(missing_ok=True)
            return error if isinstance(error, LayerError) else LayerError(f"layer {spec.id} from {spec.url}: {error}")
        return target

    async def _download(self, spec: Mountspec, part: Path) -> None:
        url = urlsplit(spec.url)
        path = url.path + (f"?{url.query}" if url.query else "")
        async with await self._client_for(f"{url.scheme}://{url.netloc}") as http:
            for attempt in range(1, FETCH_TRIES + 1):
                try:
                    with part.open("wb") as file:
                        written = 0
                        async with http.download(path, silence=FETCH_SILENCE_SECONDS) as (_, chunks):
                            async for chunk in chunks:
                                written += len(chunk)
                                if written > spec.size:
                                    raise LayerError(f"layer {spec.id} is larger than its {spec.size} bytes")
                                await asyncio.to_thread(file.write, chunk)
                    return
                except ApiError as error:
                    if not error.retry or attempt == FETCH_TRIES:
                        raise
                    log.warning("layer download broke off", extra={"layer": spec.id, "error": str(error)})
                    await asyncio.sleep(attempt)


def _copy(source: Path, part: Path) -> None:
    """Hold the content of `source` in `part`: as another name of the same file, a clone, or a copy."""
    part.unlink(missing_ok=True)
    source_status = source.stat()
    if source_status.st_mode & 0o222 == 0:
        # Only of a file nobody may write: another name is no protection against writing through the first one.
        try:
            part.hardlink_to(source)
            return
        except OSError:
            pass  # another file system
    with source.open("rb") as reading, part.open("wb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())
            return
        except OSError:
            pass  # no reflinks here
        while os.copy_file_range(reading.fileno(), writing.fileno(), 64 << 20):
            pass


def _settle(part: Path, target: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(target)
