"""The operator's commands on a node, as processes, against real peers; the directory's plain door is played."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flynn.http.server import Api, Request, listen
from flynn.identity import ANYONE
from flynn.types.instance import Instance

from .cluster import Cluster, cluster, until
from .conftest import BIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "postgres").exists(), reason="PostgreSQL 15 is not installed"),
]


class Shell:
    """root on the first node."""

    def __init__(self, one: Cluster, directory: str) -> None:
        node = one.nodes[0]
        state, config = node.directory / "host", node.directory / "etc"
        node.ca.issue_host("node1", ["127.0.0.1"]).write(state / "identity")
        config.mkdir()
        (config / "host.key").write_text("key")
        self._env = {
            "PATH": os.environ["PATH"],
            "FLYNN_STATE_DIR": str(state),
            "FLYNN_CONFIG_DIR": str(config),
            "DISCOVERD": directory,
        }

    async def run(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "flynn-host"), "database", *arguments,
            env=self._env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode()


@asynccontextmanager
async def directory(one: Cluster) -> AsyncIterator[str]:
    async def instances(request: Request) -> list[Instance]:
        return await one.registry.instances(request.path("service"))

    api = Api("directory")
    api.route("GET", "/services/{service}/instances", instances, allow=ANYONE)
    async with listen(api, "127.0.0.1", 0) as (host, port):
        yield f"http://{host}:{port}"


async def test_an_operator_sees_who_is_what_and_can_keep_it_so() -> None:
    async with cluster() as one, directory(one) as url:
        await until(one.whole)
        shell = Shell(one, url)
        code, text = await shell.run("status")
        assert code == 0, text
        rows = [line.split() for line in text.splitlines()]
        assert rows[0] == ["ROLE", "JOB", "ADDR", "WRITES", "POSITION", "WHY"]
        assert [(row[0], row[3]) for row in rows[1:]] == [("primary", "yes"), ("sync", "no"), ("async", "no")]
        assert rows[1][2] == (await one.primary()).address

        assert await shell.run("freeze", "moving", "racks") == (0, "postgres is frozen: moving racks\n")
        state = await one.state()
        assert state is not None and state.freeze is not None and state.freeze.reason == "moving racks"
        code, text = await shell.run("status")
        assert text.count("frozen: moving racks") == 3
        assert await shell.run("unfreeze") == (0, "postgres is not frozen any more\n")
        state = await one.state()
        assert state is not None and state.freeze is None

        await (await one.sync()).kill()
        code, text = await shell.run("status")
        assert code == 0 and "does not answer" in text
        code, text = await shell.run("status", "--service", "nothing")
        assert (code, "no peer of nothing is registered" in text) == (1, True)
