"""A busybox layer and a node to run it on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Imported here because pytest's plugin would import it at its very end, so deep in the stack that CPython 3.11 fails.
import hypothesis  # noqa: F401
import pytest

from flynn.host.client import HostClient
from flynn.types.host import Mountspec

from .machine import TestMachine, busybox_image, sweep


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Mountspec:
    """A layer with busybox and a link per applet."""
    return busybox_image(tmp_path_factory.mktemp("image"))


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
