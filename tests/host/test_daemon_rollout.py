"""A release with a program in it is brought onto a host and takes its daemon's place: real daemon, real pip."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.rollout import Member, Rollout, RolloutFailed
from flynn.types.errors import ApiError
from flynn.types.host import JobStatus, Mountspec
from tests.program_maker import Maker

from .machine import BIN, TestMachine, eventually
from .test_daemon_jobs import job

pytestmark = [pytest.mark.root, pytest.mark.slow]

OLD, NEW, BROKEN = "v20260801.0", "v20260802.0", "v20260803.0"


FAILS_IN_EARNEST = "import os; 'FLYNN_HOST_HANDOVER' in os.environ and os.environ.update(FLYNN_CONFIG_DIR='/x')"


@pytest.fixture
def maker(tmp_path: Path, layer_file: Path) -> Maker:
    made = Maker(tmp_path)
    made.image("shell", [made.layer(f"shell-{tmp_path.name}", layer_file.read_bytes())])
    return made


@pytest.fixture
def node(image: Mountspec, tmp_path: Path, maker: Maker) -> Iterator[TestMachine]:
    """A node whose daemon is called by a link, and that trusts the maker."""
    node = TestMachine(tmp_path / "node", image, number=3)
    node.directory.mkdir()
    links = node.directory / "bin"
    links.mkdir()
    for name in ("flynn-host", "flynn"):
        (links / name).symlink_to(BIN / name)
    (links / "own").symlink_to("/bin/true")
    try:
        node.plug_in()
        maker.program(OLD)
        shutil.copy(maker.root, node.config / "tuf-root.json")
        (node.config / "repository.txt").write_text(f"{maker.out}\n")
        node.start("--bin-dir", str(links), "--program-dir", str(node.directory / "programs"), "--tags", "disk=ssd")
        yield node
    finally:
        node.remove()


def links(node: TestMachine) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in (node.directory / "bin").iterdir()}


async def test_a_release_takes_the_place_of_a_daemon_by_one_command(
    node: TestMachine, image: Mountspec, maker: Maker
) -> None:
    wanted = job(image, "echo up; sleep 1000")
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _runs(host, wanted.id))
        first, before = await host.job(wanted.id), await host.status()

        maker.program(NEW)
        done = node.tool("update", "--hosts-only", "--json")
        steps = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(step["host"], step["step"]) for step in steps] == [
            ("node1", "images"), ("node1", "program"), ("node1", "daemon"),
        ]  # fmt: skip
        assert (steps[2]["was"], steps[2]["version"], steps[2]["jobs"]) == ("dev", NEW, 1)
        after = await host.status()
        assert (after.version, after.pid, after.tags, after.flags) == (NEW, before.pid, before.tags, before.flags)
        assert ((await host.job(wanted.id)).status, (await host.job(wanted.id)).pid) == (JobStatus.RUNNING, first.pid)
        programs = node.directory / "programs" / NEW / "bin"
        assert links(node) == {
            "flynn-host": str(programs / "flynn-host"), "flynn": str(programs / "flynn"), "own": "/bin/true",
        }  # fmt: skip
        said = await asyncio.to_thread(subprocess.check_output, [programs / "flynn-host", "version"], text=True)
        assert said.strip() == NEW

        # A second time nothing is to be done.
        again = node.tool("update", "--hosts-only")
        assert f"node1: is at {NEW} already" in again.stderr

        # One that does not run is refused while nothing has happened; the release after it is taken.
        maker.program(BROKEN, broken="raise SystemExit('broken')")
        with pytest.raises(ApiError, match="broken"):
            await host.pull_program(str(maker.out), BROKEN)
        failed = node.tool("update", "--hosts-only", "--json", check=False)
        assert failed.returncode == 1 and "broken" in json.loads(failed.stdout.splitlines()[-1])["error"]
        assert (await host.status()).version == NEW and links(node)["flynn-host"] == str(programs / "flynn-host")

        # One that does not become ready gives way, and the links stay.
        last = "v20260804.0"
        maker.program(last, broken=FAILS_IN_EARNEST)
        failed = node.tool("update", "--hosts-only", check=False)
        assert failed.returncode == 1 and "gave way to the one before" in failed.stderr
        assert (await host.status()).version == NEW and links(node)["flynn-host"] == str(programs / "flynn-host")
        assert (await host.job(wanted.id)).pid == first.pid
        # What ran before the program that runs is not needed any more.
        await host.pull_program(str(maker.out), OLD)
        assert {path.name for path in programs.parent.parent.iterdir()} == {".lock", OLD, NEW}
        await host.stop_job(wanted.id)


async def test_a_program_is_for_one_kind_of_machine(node: TestMachine, maker: Maker) -> None:
    maker.python = "cp399-plan9"
    maker.program(NEW)
    async with node.client() as host:
        with pytest.raises(ApiError, match=r"is for cp399-plan9, this machine has cp3"):
            await host.pull_program(str(maker.out), NEW)
        with pytest.raises(ApiError, match=r"has not signed any v20260809\.0/program"):
            await host.pull_program(str(maker.out), "v20260809.0")


async def _runs(host: object, job_id: str) -> bool:
    return (await host.job(job_id)).status is JobStatus.RUNNING  # type: ignore[attr-defined]


async def test_the_first_host_that_fails_ends_it_and_a_second_run_goes_on(
    node: TestMachine, image: Mountspec, maker: Maker, tmp_path: Path
) -> None:
    other = TestMachine(tmp_path / "other", image, number=2, id="node2")
    other.directory.mkdir()
    told: list[tuple[str, str]] = []
    try:
        other.plug_in()
        shutil.copy(maker.root, other.config / "tuf-root.json")
        programs = other.directory / "programs"
        programs.write_text("in the way")
        other.start("--program-dir", str(programs), "--bin-dir", str(programs))
        maker.program(NEW)
        async with node.client() as first, other.client() as second:
            members = [Member("node1", first), Member("node2", second)]
            rollout = Rollout(members, str(maker.out), NEW, lambda host, step, facts: told.append((host, step)))

            # What one of them cannot have, none gets.
            with pytest.raises(RolloutFailed, match=r"node2: .*programs"):
                await rollout.run()
            assert [(await host.status()).version for host in (first, second)] == ["dev", "dev"]
            programs.unlink()

            # The one that fails ends it.
            key = other.config / "host.key"
            key.rename(key.with_suffix(".away"))
            told.clear()
            with pytest.raises(RolloutFailed, match=r"node2: .*host\.key"):
                await rollout.run()
            assert [(await host.status()).version for host in (first, second)] == [NEW, "dev"]
            key.with_suffix(".away").rename(key)

            told.clear()
            await rollout.run()
            assert [(await host.status()).version for host in (first, second)] == [NEW, NEW]
            assert told[-2:] == [("node1", "already"), ("node2", "daemon")]
    finally:
        other.remove()
