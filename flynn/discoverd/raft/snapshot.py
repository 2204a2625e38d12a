"""The snapshot file: the replicated state, and where in the log it stands. Also what a lagging member is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flynn.discoverd.raft.journal import Entry


class Snapshot(msgspec.Struct, frozen=True):
    """`last` and `before_last` are the two newest entries it covers: the log goes on from there."""

    state: bytes
    last: Entry
    before_last: Entry
    members: Sequence[str]

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(msgspec.msgpack.encode(self))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)
