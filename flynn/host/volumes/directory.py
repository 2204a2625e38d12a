"""Volumes as plain directories: for machines without ZFS. Snapshots are copies, and limits of size are not kept.

A snapshot is sent as a line that says so, a tar archive, and the SHA-256 of the archive: whole or not at all, never as
a difference. Copies and what is received grow beside their place and are renamed when complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path

from flynn.host.volumes.commands import end, failure, run
from flynn.host.volumes.provider import BadStream, Condition, VolumeError, VolumeGone
from flynn.host.volumes.spool import spooled

log = logging.getLogger(__name__)

HEADER = b"flynn-directory-snapshot 1\n"
DIGEST_BYTES = 32
CHUNK_BYTES = 1 << 20
SILENCE_SECONDS = 120.0
EXTRACT_SECONDS = 3600.0
GROWING, REPLACED = ".growing-", ".replaced-"  # prefixes of what is not a volume (any more)
_TAR = ("tar", "--numeric-owner", "--xattrs", "--acls", "--sparse")


class DirectoryProvider:
    """A directory per volume below `directory`."""

    kind = "directory"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def open(self, *, create: bool) -> None:
        await asyncio.to_thread(self._open, create)

    def _open(self, create: bool) -> None:
        if not create and not self._directory.is_dir():
            raise VolumeGone(f"{self._directory} is missing, with the volumes that were in it")
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for replaced in self._directory.glob(f"{REPLACED}*"):
            place = self._directory / replaced.name.removeprefix(REPLACED)
            if not place.exists():
                replaced.rename(place)  # a crash between the two renames of `receive`
        for leftover in [*self._directory.glob(f"{GROWING}*"), *self._directory.glob(f"{REPLACED}*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    async def close(self) -> None:
        """Nothing is open."""

    async def check(self) -> Condition:
        try:
            usage = await asyncio.to_thread(shutil.disk_usage, self._directory)
        except OSError as error:
            raise VolumeGone(f"{self._directory}: {error.strerror}") from error
        return Condition(usage.total, usage.free)

    async def collect(self, volumes: Mapping[str, str]) -> list[str]:
        """Return nothing: what is left is found at the start."""
        return []

    async def create(self, volume_id: str, *, quota_bytes: int | None = None) -> str:
        if quota_bytes:
            log.warning("directories cannot be limited", extra={"volume": volume_id, "bytes": quota_bytes})
        await asyncio.to_thread((self._directory / volume_id).mkdir, exist_ok=True)
        return volume_id

    async def mount(self, place: str) -> Path:
        path = self._directory / place
        if not await asyncio.to_thread(path.is_dir):
            raise VolumeGone(f"{path} is gone")
        return path

    async def snapshot(self, place: str, snapshot_id: str) -> str:
        await self._copy(await self.mount(place), snapshot_id)
        return snapshot_id

    async def clone(self, place: str, volume_id: str, *, quota_bytes: int | None = None) -> str:
        await self._copy(await self.mount(place), volume_id)
        return volume_id

    async def _copy(self, source: Path, name: str) -> None:
        growing = self._directory / f"{GROWING}{name}"
        try:
            await run("cp", "-a", "--reflink=auto", "-T", str(source), str(growing), seconds=EXTRACT_SECONDS)
            await asyncio.to_thread(growing.rename, self._directory / name)
        except OSError as error:
            raise VolumeError(f"{name}: {error.strerror}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, growing, ignore_errors=True)

    async def destroy(self, place: str) -> None:
        path = self._directory / place
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        if await asyncio.to_thread(path.exists):
            raise VolumeError(f"{path} cannot be removed completely")

    async def send(self, place: str, base: str | None) -> AsyncGenerator[bytes, None]:
        path = await self.mount(place)
        argv = [*_TAR, "--create", "--file=-", f"--directory={path}", "."]
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=CHUNK_BYTES
        )
        assert process.stdout is not None and process.stderr is not None
        digest = hashlib.sha256()
        try:
            yield HEADER
            while chunk := await asyncio.wait_for(process.stdout.read(CHUNK_BYTES), SILENCE_SECONDS):
                digest.update(chunk)
                yield chunk
            errors = await process.stderr.read()
            if await process.wait() != 0:
                raise failure(argv, errors.decode(errors="replace").strip())
            yield digest.digest()
        finally:
            await end(process)

    async def receive(self, place: str, snapshot_id: str, stream: AsyncIterator[bytes]) -> tuple[str, str]:
        async with spooled(_archive(stream), self._directory) as spool:
            growing = self._directory / f"{GROWING}{snapshot_id}"
            try:
                await asyncio.to_thread(growing.mkdir)
                argv = [*_TAR, "--extract", "--preserve-permissions", "--file=-", f"--directory={growing}"]
                await run(*argv, stdin=spool.fileno(), seconds=EXTRACT_SECONDS)
                await asyncio.to_thread(growing.rename, self._directory / snapshot_id)
            except FileExistsError as error:
                raise VolumeError(f"there is a volume {snapshot_id} already") from error
            finally:
                await asyncio.to_thread(shutil.rmtree, growing, ignore_errors=True)
        await self._replace(place, snapshot_id)
        return place, snapshot_id

    async def _replace(self, place: str, snapshot_id: str) -> None:
        """Put a copy of the snapshot in the volume's place."""
        copy = f"{GROWING}{place}"
        await self._copy(self._directory / snapshot_id, copy)

        def swap() -> None:
            old = self._directory / f"{REPLACED}{place}"
            (self._directory / place).rename(old)
            (self._directory / copy).rename(self._directory / place)
            shutil.rmtree(old, ignore_errors=True)

        await asyncio.to_thread(swap)


async def _archive(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Take header and digest off. Raises `BadStream` when they are not right."""
    digest, head, held = hashlib.sha256(), b"", b""
    async for chunk in stream:
        if len(head) < len(HEADER):
            take = len(HEADER) - len(head)
            head, chunk = head + chunk[:take], chunk[take:]
            if not HEADER.startswith(head):
                raise BadStream("this is not a snapshot of the provider directory")
        held += chunk
        ready, held = held[:-DIGEST_BYTES], held[-DIGEST_BYTES:]
        digest.update(ready)
        yield ready
    if head != HEADER or digest.digest() != held:
        raise BadStream("the snapshot is cut short")
