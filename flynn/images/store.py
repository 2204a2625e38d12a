"""The cache of built layers: `layers/<id>.squashfs` with `layers/<id>.json` beside it, and `images/<id>.json`.

The JSON is written last, after the squashfs is on disk, so a layer exists exactly when its JSON does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.images.plan import built_layer
from flynn.types.artifact import Layer
from flynn.types.codec import decode, encode

# Overlay bookkeeping that must not travel with the files; `opaque` is the exception, it hides the directory below.
MEANINGLESS_XATTRS = (
    "trusted.overlay.origin",
    "trusted.overlay.impure",
    "trusted.overlay.nlink",
    "trusted.overlay.uuid",
)


@dataclass(frozen=True, slots=True)
class Store:
    root: Path

    def squashfs(self, layer_id: str) -> Path:
        return self.root / "layers" / f"{layer_id}.squashfs"

    def find(self, layer_id: str) -> Layer | None:
        """The layer if it has been built; its content is verified by those who mount it."""
        try:
            layer = decode(self.squashfs(layer_id).with_suffix(".json").read_bytes(), Layer)
            return layer if self.squashfs(layer_id).stat().st_size == layer.length else None
        except FileNotFoundError:
            return None

    def add(self, layer_id: str, tree: Path, compression_level: int, *, keep_times: bool) -> Layer:
        """Pack `tree` into the layer's squashfs, with owners, modes and extended attributes.

        Without `keep_times` every file is of 1970, so that equal content makes an equal layer. Trees with bytecode
        that is checked against the time of its source must keep theirs.
        """
        _drop_overlay_xattrs(tree)
        target = self.squashfs(layer_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{layer_id}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        command = ["mksquashfs", str(tree), str(beside), "-noappend", "-no-progress", "-quiet", "-comp", "zstd"]
        command += ["-Xcompression-level", str(compression_level), "-mkfs-time", "0"]
        command += [] if keep_times else ["-all-time", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        layer = built_layer(layer_id, beside.stat().st_size, _hash_file(beside))
        _rename_synced(beside, target)
        write_synced(target.with_suffix(".json"), encode(layer))
        return layer

    def add_manifest(self, image_id: str, content: bytes) -> None:
        path = self.root / "images" / f"{image_id}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builds out; they wait. The kernel lets go of the lock when the process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def write_synced(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    _rename_synced(beside, path)


def _rename_synced(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.rename(target)


def _hash_file(path: Path) -> str:
    digest = hashlib.new("sha512_256")
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _drop_overlay_xattrs(tree: Path) -> None:
    for directory, names, files in os.walk(tree):
        for path in (directory, *(os.path.join(directory, name) for name in (*names, *files))):
            for name in os.listxattr(path, follow_symlinks=False):
                if name in MEANINGLESS_XATTRS:
                    os.removexattr(path, name, follow_symlinks=False)
