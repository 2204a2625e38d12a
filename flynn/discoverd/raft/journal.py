"""The Raft log on disk, in the shape pysyncobj expects of a journal.

Its own journal is a memory map that nobody syncs, so an acknowledged write may be lost with the power. Here entries are
appended to a file and are durable after `sync`, which the node calls before anything is counted as committed and before
anything that promises them leaves for another member.

    header   "FLYNLOG1"
    record   length u32, crc32 u32, index u64, term u64, command        (little endian; the crc covers all after itself)

pysyncobj takes back everything behind the position a leader writes at, though most of it usually comes again with the
same message; a crash in between would lose entries this member has already confirmed. So taking back is put off: an
entry that is added again is recognised, and only a *different* one cuts the log, which is what the Raft paper asks for.

A torn record at the end is what a power cut in mid-write leaves: it was never promised to anybody and is cut off.
Term and vote are in a file of their own, replaced whole. The commit index is not stored: a new leader finds it again
by committing an entry of its own term.

Not thread-safe: it belongs to the thread that ticks the node.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import overload

import msgspec
from pysyncobj.journal import Journal

Entry = tuple[bytes, int, int]
"""Command, index, term: the order is pysyncobj's."""

_MAGIC = b"FLYNLOG1"
_FRAME = struct.Struct("<II")
_POSITION = struct.Struct("<QQ")


class Ballot(msgspec.Struct, frozen=True):
    """What a member must never forget, or it could vote twice in one term."""

    term: int = 0
    voted_for: str | None = None


class DurableJournal(Journal):  # type: ignore[misc]  # the library has no types
    def __init__(self, path: Path) -> None:
        self._path = path
        self._ballot_path = path.with_suffix(".ballot")
        self._ballot = _read_ballot(self._ballot_path)
        self._entries: list[Entry] = []
        self._offsets: list[int] = []  # where each entry begins in the file
        self._pending = bytearray()  # appended, but not yet given to the kernel
        if not path.exists():
            write_durably(path, _MAGIC)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._size = self._recover()

    def add(self, command: bytes, idx: int, term: int) -> None:
        entry = (bytes(command), idx, term)
        position = idx - self._entries[0][1] if self._entries else 0
        if 0 <= position < len(self._entries):
            if self._entries[position] == entry:
                return
            self._cut(position)
        self._entries.append(entry)
        self._offsets.append(self._size)
        record = _encode(entry)
        self._pending += record
        self._size += len(record)

    @property
    def dirty(self) -> bool:
        return bool(self._pending)

    def sync(self) -> None:
        """After this every entry added so far survives a power cut. Costs nothing if nothing was added."""
        if self._pending:
            self._write_pending()
            os.fdatasync(self._file)

    def clear(self) -> None:
        if self._entries:
            self._cut(0)

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Put off until something else is added there."""

    def _cut(self, position: int) -> None:
        self._write_pending()
        self._size = self._offsets[position]
        del self._entries[position:]
        del self._offsets[position:]
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
        os.fdatasync(self._file)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Drop what a snapshot covers. The shorter log replaces the old one whole, so a crash leaves one of the two."""
        if entryTo <= 0:
            return
        entries = self._entries[entryTo:]
        write_durably(self._path, _MAGIC + b"".join(map(_encode, entries)))
        os.close(self._file)
        self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._pending.clear()
        self._size = self._recover()

    @overload
    def __getitem__(self, item: int) -> Entry: ...

    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...

    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        pass

    def getRaftCommitIndex(self) -> int:
        return 1

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Remember a term and the vote given in it, which stays given also when an observer has put its term aside."""
        if term < self._ballot.term or (term == self._ballot.term and votedForNodeId is None):
            return
        self._ballot = Ballot(term, votedForNodeId)
        write_durably(self._ballot_path, msgspec.json.encode(self._ballot))

    def getCurrentTerm(self) -> int:
        return self._ballot.term

    def getVotedForNodeId(self) -> str | None:
        return self._ballot.voted_for

    def _destroy(self) -> None:
        self.sync()
        os.close(self._file)

    def _write_pending(self) -> None:
        view = memoryview(self._pending)
        while view:
            view = view[os.write(self._file, view) :]
        view.release()
        self._pending = bytearray()

    def _recover(self) -> int:
        """Read the log, cut off a torn end, and leave the file position behind the last whole record."""
        raw = self._path.read_bytes()
        if not raw.startswith(_MAGIC):
            raise ValueError(f"{self._path} is not a Raft log of this version")
        self._entries, self._offsets = [], []
        offset = len(_MAGIC)
        while (decoded := _decode(raw, offset)) is not None:
            entry, after = decoded
            self._entries.append(entry)
            self._offsets.append(offset)
            offset = after
        if offset < len(raw):
            os.ftruncate(self._file, offset)
            os.fdatasync(self._file)
        os.lseek(self._file, offset, os.SEEK_SET)
        return offset


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file whole: written beside, synced, renamed, and the name synced too."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(entry: Entry) -> bytes:
    command, index, term = entry
    body = _POSITION.pack(index, term) + command
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _decode(raw: bytes, offset: int) -> tuple[Entry, int] | None:
    """The record at `offset` and the offset behind it; None if there is no whole one."""
    start = offset + _FRAME.size
    if start > len(raw):
        return None
    length, crc = _FRAME.unpack_from(raw, offset)
    body = raw[start : start + length]
    if len(body) < max(length, _POSITION.size) or zlib.crc32(body) != crc:
        return None
    index, term = _POSITION.unpack_from(body)
    return (body[_POSITION.size :], index, term), start + length


def _read_ballot(path: Path) -> Ballot:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ballot)
    except FileNotFoundError:
        return Ballot()
