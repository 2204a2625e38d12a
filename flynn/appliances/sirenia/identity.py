"""The logical identity of a peer: a file on its volume, so it outlives the container but not the data."""

from __future__ import annotations

import os
from pathlib import Path


def ensure_instance_id(path: Path, new_id: str) -> str:
    """The identity in `path`; `new_id` is written there if there is none. It is on disk before it is used."""
    try:
        if known := path.read_text().strip():
            return known
    except FileNotFoundError:
        pass
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w") as file:
        file.write(new_id)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)
    return new_id


def sync_directory(directory: Path) -> None:
    """Make renames and new names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
