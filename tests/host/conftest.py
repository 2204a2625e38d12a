"""A busybox layer and a node to run it on."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Imported here because pytest's plugin would import it at its very end, so deep in the stack that CPython 3.11 fails.
import hypothesis  # noqa: F401
import pytest

from flynn.host.client import HostClient
from flynn.types.host import Mountspec

from .machine import TestMachine, sweep


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Mountspec:
    """A layer with busybox and a link per applet."""
    work = tmp_path_factory.mktemp("image")
    root = work / "root"
    for directory in ("bin", "etc", "tmp", "proc", "sys", "dev"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", root / "bin/busybox")
    for applet in subprocess.check_output(["/usr/bin/busybox", "--list"], text=True).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")
    file = work / "busybox.squashfs"
    subprocess.check_call(["mksquashfs", root, file, "-quiet", "-no-progress", "-noappend"], stdout=subprocess.DEVNULL)
    content = file.read_bytes()
    return Mountspec(
        type="squashfs",
        id="busybox",
        url=f"file://{file}",
        size=len(content),
        hashes={"sha256": hashlib.sha256(content).hexdigest()},
    )


@pytest.fixture(scope="module")
def machine(image: Mountspec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestMachine]:
    """A node whose daemon runs."""
    sweep()
    node = TestMachine(tmp_path_factory.mktemp("node"), image, number=1)
    try:
        node.plug_in()
        node.start()
        yield node
    finally:
        node.remove()


@pytest.fixture
async def host(machine: TestMachine) -> AsyncIterator[HostClient]:
    """The node's API, with network and discoverd configured."""
    async with machine.client() as client:
        await machine.configure(client)
        yield client


@pytest.fixture
def layer_file(image: Mountspec) -> Path:
    return Path(image.url.removeprefix("file://"))
