"""Squashfs layers: each mounted once per host, shared by all containers that use it, unmounted when none does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from flynn.host.runtime import loop

_ALGORITHMS = {"sha256": "sha256", "sha512": "sha512", "sha512_256": "sha512_256"}
_CHUNK = 1 << 20


class LayerError(Exception):
    """A layer that cannot be mounted or is not what its hashes say."""


class LayerMounts:
    """Mounts below `<directory>/mnt/<layer id>`. Who uses what is kept in memory; what is mounted, the kernel knows.

    After a restart: `adopt` for every container taken over, then `collect`.
    """

    def __init__(self, directory: Path) -> None:
        self._mounts = directory.resolve() / "mnt"
        self._users: defaultdict[str, set[str]] = defaultdict(set)  # layer id -> users
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # one (un)mount of a layer at a time
        self._mounted = {path.name for path in loop.mount_points(self._mounts)}

    async def acquire(self, layer: str, image: Path, user: str) -> Path:
        """Mount `image` (a squashfs file) read-only unless it is already; return the directory for RootFS.lower.

        `user` is the job id. Safe to call concurrently and repeatedly.
        """
        self._users[layer].add(user)
        target = self._mounts / layer
        async with self._turns[layer]:
            if layer not in self._mounted:
                try:
                    await asyncio.to_thread(_mount, image, target)
                except OSError as error:
                    self._users[layer].discard(user)
                    raise LayerError(f"cannot mount layer {layer}: {error}") from error
                self._mounted.add(layer)
        return target

    def mounted(self, layer: str) -> bool:
        """Tell whether a layer is mounted."""
        return layer in self._mounted

    async def release(self, user: str) -> None:
        """Drop all uses of one user; layers without any other are unmounted. Idempotent."""
        for layer in [layer for layer, users in self._users.items() if user in users]:
            self._users[layer].discard(user)
            await self._unmount_unused(layer)

    def adopt(self, user: str, lower: Collection[str]) -> None:
        """Count the layers of a container of an earlier daemon: pass `spec.rootfs.lower`."""
        for path in map(Path, lower):
            if path.parent == self._mounts:
                self._users[path.name].add(user)

    async def collect(self) -> list[str]:
        """Unmount all layers nobody uses (leftovers of an earlier daemon); return their ids.

        Mount points that a power cut has left are removed as well. For the start, before anybody acquires layers.
        """
        unused = [layer for layer in sorted(self._mounted) if not self._users[layer]]
        for layer in unused:
            await self._unmount_unused(layer)
        for empty in self._mounts.glob("*"):
            if empty.name not in self._mounted:
                with contextlib.suppress(OSError):
                    empty.rmdir()
        return unused

    async def _unmount_unused(self, layer: str) -> None:
        async with self._turns[layer]:
            if self._users[layer] or layer not in self._mounted:
                return
            await asyncio.to_thread(loop.unmount, self._mounts / layer)
            self._mounted.discard(layer)
            (self._mounts / layer).rmdir()


def _mount(image: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    loop.mount_image(image, target, "squashfs", read_only=True)


def verify(path: Path, hashes: Mapping[str, str], length: int) -> None:
    """Read the file once and compare length and every known hash (sha256, sha512, sha512_256). Blocking: use a thread.

    Raises LayerError, also when no known hash is given.
    """
    wanted = {name: value.lower() for name, value in hashes.items() if name in _ALGORITHMS}
    if not wanted:
        raise LayerError("no known hash is given")
    running = {name: hashlib.new(_ALGORITHMS[name]) for name in wanted}
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            for digest in running.values():
                digest.update(chunk)
    if size != length:
        raise LayerError(f"{path.name} has {size} bytes, expected {length}")
    for name, digest in running.items():
        if digest.hexdigest() != wanted[name]:
            raise LayerError(f"{path.name} has {name} {digest.hexdigest()}, expected {wanted[name]}")
