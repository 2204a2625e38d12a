"""Layers and write layers: real loop mounts, found again by a second daemon."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flynn.host.runtime import loop
from flynn.host.runtime.layers import LayerError, LayerMounts, verify
from flynn.host.runtime.runtime import Runtime
from flynn.host.runtime.scratch import ScratchPool
from flynn.host.runtime.spec import ContainerSpec, RootFS
from tests.host.runtime.conftest import run

MIB = 1 << 20


@pytest.mark.root
class TestLayers:
    async def test_mounted_once_for_all_users(self, layer: Path, tmp_path: Path) -> None:
        layers = LayerMounts(tmp_path)
        one, two = await asyncio.gather(layers.acquire("a", layer, "job1"), layers.acquire("a", layer, "job2"))
        assert one == two
        assert (one / "bin/busybox").exists()
        assert loop.mount_points(tmp_path) == [one]
        await layers.release("job1")
        assert loop.mount_points(tmp_path) == [one]
        await layers.release("job2")
        await layers.release("job2")
        assert loop.mount_points(tmp_path) == []
        assert await layers.acquire("a", layer, "job3") == one
        await layers.release("job3")

    async def test_the_next_daemon_keeps_what_is_used_and_unmounts_the_rest(self, layer: Path, tmp_path: Path) -> None:
        first = LayerMounts(tmp_path)
        used, unused = await first.acquire("used", layer, "job1"), await first.acquire("unused", layer, "job2")
        second = LayerMounts(tmp_path)
        second.adopt("job1", [str(used)])
        assert await second.collect() == ["unused"]
        assert loop.mount_points(tmp_path) == [used]
        assert not unused.exists()
        await second.release("job1")
        assert loop.mount_points(tmp_path) == []

    async def test_not_an_image(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"x" * 8192)
        layers = LayerMounts(tmp_path)
        with pytest.raises(LayerError, match="cannot mount layer x"):
            await layers.acquire("x", tmp_path / "x", "job")
        assert await layers.collect() == []


class TestVerify:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "f").write_bytes(b"content")
        return tmp_path / "f"

    def test_all_known_hashes_count(self, file: Path) -> None:
        right = {name: hashlib.new(name, b"content").hexdigest() for name in ("sha256", "sha512", "sha512_256")}
        verify(file, {**right, "md5": "ignored"}, 7)
        for name in right:
            with pytest.raises(LayerError, match=name):
                verify(file, {**right, name: "0" * 64}, 7)

    def test_length(self, file: Path) -> None:
        with pytest.raises(LayerError, match="has 7 bytes, expected 8"):
            verify(file, {"sha256": hashlib.sha256(b"content").hexdigest()}, 8)

    def test_no_known_hash(self, file: Path) -> None:
        with pytest.raises(LayerError, match="no known hash"):
            verify(file, {"md5": "0"}, 7)


@pytest.mark.root
class TestScratch:
    async def test_size_is_limited_and_all_is_gone_after_release(self, tmp_path: Path) -> None:
        async with ScratchPool(tmp_path, ready=1) as pool:
            path = await pool.take(16 * MIB)
            assert os.listdir(path) == []
            with pytest.raises(OSError, match="No space left"):
                (path / "big").write_bytes(bytes(17 * MIB))
            await pool.release(path)
            await pool.release(path)
            assert not path.exists()
        assert list(tmp_path.iterdir()) == []
        assert loop.mount_points(tmp_path) == []

    async def test_is_ready_before_it_is_asked_for(self, tmp_path: Path) -> None:
        async with ScratchPool(tmp_path, ready=2) as pool:
            async with asyncio.timeout(5):
                while len(loop.mount_points(tmp_path)) < 2:
                    await asyncio.sleep(0.01)
            ready = loop.mount_points(tmp_path)
            path = await pool.take()
            assert path in ready
            await pool.release(path)

    async def test_what_is_not_formatted_anew_is_as_good(self, tmp_path: Path) -> None:
        pool = ScratchPool(tmp_path)
        paths = [await pool.take(64 * MIB) for _ in range(3)]
        for path in paths:
            (path / "mine").write_bytes(os.urandom(1 << 20))
        assert [[entry.name for entry in path.iterdir()] for path in paths] == [["mine"]] * 3
        free = [os.statvfs(path).f_bavail for path in paths]
        assert free == [free[0]] * 3
        for path in paths:
            await pool.release(path)
        image = tmp_path / "image"
        shutil.copy(await self._image_of_a_used_one(pool), image)
        checked = await asyncio.create_subprocess_exec("e2fsck", "-f", "-n", image, stdout=subprocess.DEVNULL)
        assert await checked.wait() == 0

    async def _image_of_a_used_one(self, pool: ScratchPool) -> Path:
        """Return the file of a file system that was written to and unmounted."""
        path = await pool.take(64 * MIB)
        for number in range(100):
            (path / f"file{number}").write_bytes(bytes(5000))
        loop.unmount(path)
        return path.parent / "image"

    async def test_the_next_daemon_keeps_what_is_used(self, tmp_path: Path) -> None:
        first = ScratchPool(tmp_path)
        used, unused = await first.take(), await first.take()
        (used / "mine").write_text("x")
        second = ScratchPool(tmp_path)
        second.adopt(used)
        await second.collect()
        assert loop.mount_points(tmp_path) == [used]
        assert (used / "mine").exists()
        assert not unused.parent.exists()
        await second.release(used)
        assert list(tmp_path.iterdir()) == []

    async def test_a_container_on_both(
        self, runtime: Runtime, spec: Callable[..., ContainerSpec], layer: Path, tmp_path: Path
    ) -> None:
        layers = LayerMounts(tmp_path / "layers")
        async with ScratchPool(tmp_path / "scratch", ready=1) as pool:
            lower = await layers.acquire("a", layer, "host-1")
            writable = await pool.take(16 * MIB)
            script = "dd if=/dev/zero of=/big bs=1M count=20; rm -f /big; echo fine > /x; cat /x"
            fields = {"rootfs": RootFS(lower=(str(lower),), writable=str(writable))}
            try:
                _, out, err = await run(runtime, spec(script, **fields))
            finally:
                await pool.release(writable)
                await layers.release("host-1")
        assert out == "fine\n"
        assert "No space left" in err
        assert loop.mount_points(tmp_path) == []
