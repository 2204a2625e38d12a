"""Image layers on this host: fetched once, verified before they are mounted for the first time, kept by id.

`<state>/layers/<id>.squashfs`; a file under its final name was complete and verified when it came. It is verified again
at its first use after the daemon's start, and whenever it has changed since, because disks rot and people try things.
While a layer is mounted nobody watches its file. Mounting is the runtime's affair.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import unquote, urlsplit

from flynn.aio.supervisor import TaskSet
from flynn.host.download.errors import DownloadFailed
from flynn.host.runtime.layers import LayerError, verify
from flynn.http.client import HttpClient
from flynn.types.distribution import target_of
from flynn.types.errors import ApiError
from flynn.types.host import Mountspec

log = logging.getLogger(__name__)

FETCH_TRIES = 3
FETCH_SILENCE_SECONDS = 60.0
CHUNK_BYTES = 1 << 20
COLLECT_EVERY = timedelta(hours=1)
USE_NOTED_EVERY = timedelta(hours=1)
UNUSED = timedelta(days=7)
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file

ClientFor = Callable[[str], Awaitable[HttpClient]]
Claim = tuple[int, frozenset[tuple[str, str]]]  # size and hashes, as a job says
FileVersion = tuple[int, int, int]  # inode, size, time of the last change


class ReleasedFiles(Protocol):
    """Files of signed repositories, for layers whose address is `<repository>?target=<name>`."""

    async def fetch(self, repository: str, name: str, into: Path) -> None:
        """Have the verified content in `into`. Raises `DownloadFailed`."""


class LayerStore:
    """The layers of one host. `client_for` makes the client of a base URL (the blobstore wants our certificate);
    `mounted` tells whether jobs use a layer."""

    def __init__(
        self,
        directory: Path,
        client_for: ClientFor,
        tasks: TaskSet,
        *,
        released: ReleasedFiles | None = None,
        mounted: Callable[[str], bool] = lambda layer_id: False,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory, self._client_for, self._tasks = directory, client_for, tasks
        self._released, self._mounted = released, mounted
        self._running: dict[tuple[str, Claim], asyncio.Task[Path | LayerError]] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # one import of an id at a time
        self._verified: dict[str, tuple[FileVersion, Claim]] = {}
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
        claim = (spec.size, frozenset(spec.hashes.items()))
        if (version := _version(target)) is not None and self._verified.get(spec.id) == (version, claim):
            self._note_use(spec.id, target)
            return target
        task = self._running.get((spec.id, claim))
        if task is None:
            task = self._tasks.start(f"import layer {spec.id}", self._have(spec, target, claim))
            self._running[spec.id, claim] = task
            task.add_done_callback(lambda _: self._running.pop((spec.id, claim), None))
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

    def unused(self, in_use: Collection[str]) -> list[Path]:
        """Return the files of layers that neither these jobs have nor anyone has mounted, the longest unused first."""
        files = [
            file
            for file in self._directory.glob("*.squashfs")
            if file.stem not in in_use and not self._mounted(file.stem) and not self._turns[file.stem].locked()
        ]
        return sorted(files, key=lambda file: file.stat().st_mtime)

    def _note_use(self, layer_id: str, target: Path) -> None:
        """Keep `collect` away from a layer. Not at each use: it changes the file's version."""
        version, claim = self._verified[layer_id]
        if time.time() - version[2] / 1e9 > USE_NOTED_EVERY.total_seconds():
            os.utime(target)
            self._verified[layer_id] = (_version(target) or version, claim)

    async def _have(self, spec: Mountspec, target: Path, claim: Claim) -> Path | LayerError:
        """Verify the file that is there, else import it. Errors are returned: the task belongs to several callers."""
        try:
            async with self._turns[spec.id]:
                if not target.exists():
                    await self._import(spec, target)
                elif flaw := await _flaw(spec, target):
                    if self._mounted(spec.id):
                        raise LayerError(f"layer {spec.id} refused, and jobs use it: {flaw}")
                    log.error("layer on the disk refused", extra={"layer": spec.id, "reason": flaw})
                    try:
                        await self._import(spec, target)
                    except (OSError, ApiError, DownloadFailed, LayerError) as error:
                        raise LayerError(f"{flaw}; and it cannot be fetched anew: {error}") from error
                if (version := _version(target)) is not None:
                    self._verified[spec.id] = (version, claim)
                    self._note_use(spec.id, target)
        except LayerError as error:
            return error
        except (OSError, ApiError, DownloadFailed) as error:
            return LayerError(f"layer {spec.id} from {spec.url}: {error}")
        return target

    async def _import(self, spec: Mountspec, target: Path) -> None:
        """Fetch, verify, rename."""
        part = self._directory / f".{spec.id}.part"
        try:
            if spec.size <= 0:
                raise LayerError(f"layer {spec.id} has no size")
            url = urlsplit(spec.url)
            if self._released is not None and (released := target_of(spec.url)) is not None:
                await self._released.fetch(*released, into=part)
            elif url.scheme == "file":
                await asyncio.to_thread(_copy, Path(unquote(url.path)), part)
            elif url.scheme in ("http", "https"):
                await self._download(spec, part)
            else:
                raise LayerError(f"layer {spec.id} has the unknown kind of URL {spec.url!r}")
            await asyncio.to_thread(verify, part, spec.hashes, spec.size)
            await asyncio.to_thread(settle, part, target)
            log.info("layer imported", extra={"layer": spec.id, "bytes": spec.size, "url": spec.url})
        finally:
            part.unlink(missing_ok=True)

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
        shutil.copyfileobj(
            reading, writing, CHUNK_BYTES
        )  # copy_file_range refuses to go from one file system to another


async def _flaw(spec: Mountspec, file: Path) -> str:
    """Say what is wrong with a layer's file; nothing if it is what the job asks for."""
    try:
        await asyncio.to_thread(verify, file, spec.hashes, spec.size)
    except LayerError as error:
        return str(error)
    return ""


def _version(file: Path) -> FileVersion | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def settle(part: Path, target: Path) -> None:
    """Give a verified file its final name, once its content is on the disk. Blocking."""
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.rename(target)
