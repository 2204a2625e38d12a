"""The volume back end: blobs as plain files on a mounted volume, their records beside them.

    objects/<2 hex>/<id>     the bytes, never changed after they were written
    names/<path>,blob        the record (JSON) that makes object <id> the blob of that name

Renaming the record into place is the commit: before it the object is garbage, after it the old object is. Garbage left
by a crash is swept at the next start. Hashes are computed while writing and kept in the record.

The records live here and not in PostgreSQL, where the original has them: the store then needs no database to come back
after a power cut (the database's own image layers may well be what is wanted first), a backup of the volume is whole by
itself, and a read is one small file. The price is that a listing reads a directory and that there is one writer
process per volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from flynn.blobstore import names
from flynn.blobstore.backend import Blob, Guard, no_guard
from flynn.blobstore.conditions import Span
from flynn.types.errors import Conflict, NotFound

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20  # written and hashed in one go by a worker thread: 1 MiB takes about 4 ms
READ_BYTES = 256 << 10


class _Upload:
    """An object being written by worker threads, until it is committed or discarded, whichever comes first.

    A cancelled request leaves its worker thread running; the lock makes a discard wait for it, and the state keeps a
    commit from naming a discarded object, or a discard from removing a committed one.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.size = 0
        self._file = path.open("xb", buffering=0)
        self._sha512 = hashlib.sha512()
        self._sha512_256 = hashlib.new("sha512_256")
        self._lock = threading.Lock()
        self._settled = False

    def write(self, piece: bytes | bytearray | memoryview) -> None:
        view = memoryview(piece)
        with self._lock:
            if self._settled:
                raise ValueError("the upload was given up")
            self._sha512.update(view)
            self._sha512_256.update(view)
            self.size += len(view)
            while view:
                view = view[self._file.write(view) :]

    def write_file(self, path: Path) -> None:
        """Copy a whole file in."""
        with path.open("rb") as source:
            while piece := source.read(PIECE_BYTES):
                self.write(piece)

    def commit(self, step: Callable[[], None]) -> None:
        """Make the bytes durable, then take the step that gives them a name."""
        with self._lock:
            if self._settled:
                raise ValueError("the upload was given up")
            os.fsync(self._file.fileno())
            self._file.close()
            _sync_directory(self.path.parent)
            step()
            self._settled = True

    def discard(self) -> None:
        """Remove the object unless it was committed. May block for the time of one write or commit."""
        with self._lock:
            if not self._settled:
                self._settled = True
                self._file.close()
                self.path.unlink(missing_ok=True)

    def blob(self, name: str, content_type: str, modified: datetime | None = None) -> Blob:
        return Blob(
            name=name,
            object_id=self.path.name,
            size=self.size,
            content_type=content_type,
            sha512=self._sha512.hexdigest(),
            sha512_256=self._sha512_256.hexdigest(),
            modified=modified or datetime.now(UTC),
        )


class _OpenFile:
    """A blob whose object file is held open: deleting the name does not take it away from the reader."""

    def __init__(self, blob: Blob, fd: int) -> None:
        self.blob = blob
        self._fd = fd

    async def read(self, span: Span) -> AsyncIterator[bytes]:
        position, end = span.start, span.end + 1
        while position < end:
            piece = await asyncio.to_thread(os.pread, self._fd, min(READ_BYTES, end - position), position)
            if not piece:
                raise OSError(f"{self.blob.name}: object {self.blob.object_id} is shorter than its record says")
            position += len(piece)
            yield piece


class VolumeBackend:
    """Blobs below one directory. Exactly one process may write there at a time."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._names = root / "names"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._names.mkdir(parents=True, exist_ok=True)
        self._commit = threading.Lock()  # a guard's look at the old record and the rename of the new one are one step
        self._unswept = [path for path in self._objects.glob("*/*")]

    async def find(self, name: str) -> Blob | None:
        return await asyncio.to_thread(self._record, name)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[_OpenFile]:
        blob, fd = await asyncio.to_thread(self._open, name)
        try:
            yield _OpenFile(blob, fd)
        finally:
            os.close(fd)

    async def put(
        self,
        name: str,
        body: AsyncIterable[bytes],
        *,
        content_type: str = "",
        guard: Guard = no_guard,
        modified: datetime | None = None,
    ) -> Blob:
        guard(await self.find(name))
        async with self._upload() as upload:
            await _fill(upload, body)
            blob = upload.blob(name, content_type, modified)
            await asyncio.to_thread(upload.commit, partial(self._commit_record, blob, guard))
        return blob

    async def append(self, name: str, body: AsyncIterable[bytes], *, offset: int, guard: Guard = no_guard) -> Blob:
        async with self.open(name) as old, self._upload() as upload:

            def unchanged(now: Blob | None) -> None:
                if now is None or now.object_id != old.blob.object_id:
                    raise Conflict(f"{name} was changed during the upload")
                guard(now)

            guard(old.blob)
            if offset != old.blob.size:
                raise Conflict(f"{name} has {old.blob.size} bytes, the offset given is {offset}")
            await asyncio.to_thread(upload.write_file, self._object(old.blob.object_id))
            await _fill(upload, body)
            blob = upload.blob(name, old.blob.content_type)
            await asyncio.to_thread(upload.commit, partial(self._commit_record, blob, unchanged))
        return blob

    async def copy(self, source: str, target: str, *, guard: Guard = no_guard) -> Blob:
        return await asyncio.to_thread(self._copy, source, target, guard)

    async def delete(self, name: str, *, guard: Guard = no_guard) -> None:
        await asyncio.to_thread(self._delete, name, guard)

    async def children(self, directory: str) -> list[str]:
        return await asyncio.to_thread(self._children, directory)

    async def records(self) -> list[Blob]:
        return await asyncio.to_thread(self._records)

    async def sweep(self) -> int:
        """Remove the objects that were there at start and belong to no record; returns how many."""
        removed = await asyncio.to_thread(self._sweep)
        if removed:
            log.info("removed what interrupted writes left behind", extra={"objects": removed})
        return removed

    # In worker threads from here on.

    @asynccontextmanager
    async def _upload(self) -> AsyncIterator[_Upload]:
        """A new object; unless the block commits it, it is discarded."""
        object_id = uuid.uuid4().hex
        upload = await asyncio.to_thread(_Upload, self._object(object_id))
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise

    def _object(self, object_id: str) -> Path:
        return self._objects / object_id[:2] / object_id

    def _record_path(self, name: str) -> Path:
        return self._names / names.blob_path(name)

    def _record(self, name: str) -> Blob | None:
        try:
            raw = self._record_path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _decode(name, raw)

    def _open(self, name: str) -> tuple[Blob, int]:
        while True:
            blob = self._record(name)
            if blob is None:
                raise NotFound(f"there is no blob {name}")
            try:
                return blob, os.open(self._object(blob.object_id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self._record(name) == blob:
                    raise OSError(f"{name}: object {blob.object_id} is gone") from None
                # replaced between the two steps: look again

    def _commit_record(self, blob: Blob, guard: Guard) -> None:
        path = self._record_path(blob.name)
        beside = path.with_name(path.name + ".new")
        with self._commit:
            old = self._record(blob.name)
            guard(old)
            new_directories = [d for d in (path.parent, *path.parent.parents) if not d.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(_encode(blob))
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
            _sync_directory(path.parent)
            for directory in new_directories:
                _sync_directory(directory.parent)
        if old is not None:
            self._object(old.object_id).unlink(missing_ok=True)

    def _copy(self, source: str, target: str, guard: Guard) -> Blob:
        blob, fd = self._open(source)
        try:
            object_id = uuid.uuid4().hex
            path = self._object(object_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._object(blob.object_id), path)  # objects never change, so sharing the bytes is safe
            except OSError:
                # replaced meanwhile, or a file system without links: the open file still has the bytes
                with open(fd, "rb", closefd=False) as old, path.open("xb") as new:
                    shutil.copyfileobj(old, new, PIECE_BYTES)
                    new.flush()
                    os.fsync(new.fileno())
            _sync_directory(path.parent)
            copied = Blob(
                name=target,
                object_id=object_id,
                size=blob.size,
                content_type=blob.content_type,
                sha512=blob.sha512,
                sha512_256=blob.sha512_256,
                modified=datetime.now(UTC),
            )
            try:
                self._commit_record(copied, guard)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return copied
        finally:
            os.close(fd)

    def _delete(self, name: str, guard: Guard) -> None:
        directory = self._names / names.directory_path(name)
        with self._commit:
            blob = self._record(name)
            guard(blob)
            doomed = [] if blob is None else [(self._record_path(name), blob.object_id)]
            doomed += self._records_below(directory)
            for path, _ in doomed:
                path.unlink(missing_ok=True)
            if directory.is_dir() and name != "/":
                shutil.rmtree(directory)
            self._prune(directory.parent)
        for _, object_id in doomed:
            self._object(object_id).unlink(missing_ok=True)

    def _records(self) -> list[Blob]:
        found = []
        for folder, _, files in os.walk(self._names):
            directory = names.directory_name(os.path.relpath(folder, self._names))
            for file in files:
                if file.endswith(names.BLOB_SUFFIX):
                    blob = self._record(names.child_name(directory, file))
                    if blob is not None:
                        found.append(blob)
        return found

    def _records_below(self, directory: Path) -> list[tuple[Path, str]]:
        found = []
        for folder, _, files in os.walk(directory):
            for file in files:
                if file.endswith(names.BLOB_SUFFIX):
                    path = Path(folder, file)
                    found.append((path, _decode("", path.read_bytes()).object_id))
        return found

    def _prune(self, directory: Path) -> None:
        """Remove directories that became empty, up to the root, and make the removal durable."""
        while directory != self._names:
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                break
            directory = directory.parent
        if directory.exists():
            _sync_directory(directory)

    def _children(self, directory: str) -> list[str]:
        try:
            entries = os.listdir(self._names / names.directory_path(directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        children = {
            names.child_name(directory, entry) for entry in entries if not entry.endswith(f"{names.BLOB_SUFFIX}.new")
        }
        return sorted(children, key=lambda name: name.encode("utf-8", "surrogateescape"))

    def _sweep(self) -> int:
        wanted = {object_id for _, object_id in self._records_below(self._names)}
        removed = 0
        for path in self._unswept:
            if path.name not in wanted:
                path.unlink(missing_ok=True)
                removed += 1
        for leftover in self._names.rglob(f"*{names.BLOB_SUFFIX}.new"):
            with self._commit, contextlib.suppress(FileNotFoundError):
                leftover.unlink()
        self._unswept = []
        return removed


async def _fill(upload: _Upload, body: AsyncIterable[bytes]) -> None:
    """Stream `body` into the object."""
    buffer = bytearray()
    async for chunk in body:
        buffer += chunk
        if len(buffer) >= PIECE_BYTES:
            await asyncio.to_thread(upload.write, buffer)
            buffer = bytearray()
    await asyncio.to_thread(upload.write, buffer)


def _encode(blob: Blob) -> bytes:
    return json.dumps(
        {
            "object": blob.object_id,
            "size": blob.size,
            "type": blob.content_type,
            "sha512": blob.sha512,
            "sha512_256": blob.sha512_256,
            "modified": blob.modified.isoformat(),
        }
    ).encode()


def _decode(name: str, raw: bytes) -> Blob:
    record = json.loads(raw)
    return Blob(
        name=name,
        object_id=record["object"],
        size=record["size"],
        content_type=record["type"],
        sha512=record["sha512"],
        sha512_256=record["sha512_256"],
        modified=datetime.fromisoformat(record["modified"]),
    )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
