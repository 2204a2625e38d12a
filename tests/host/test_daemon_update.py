"""The daemon is updated while jobs run and clients ask: what they may not notice, and what a bad program may not do."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flynn.host.client import HostClient
from flynn.host.logs import record
from flynn.types.errors import ApiError, Conflict, PreconditionFailed, ValidationError
from flynn.types.host import HostCommand, HostStatus, JobStatus, Mountspec

from .machine import APP, BIN, TestMachine, ended, eventually
from .test_daemon_jobs import job, output

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: Some thousand numbered lines a second, each in two pieces.
LOAD = "i=0; while true; do for n in 1 2 3 4 5; do i=$((i+1)); printf 'li'; echo ne $i; done; sleep 0; done"
HALVES = "printf begun; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo ' and ended'; sleep 1000"


@pytest.fixture
def node(image: Mountspec, tmp_path: Path) -> Iterator[TestMachine]:
    node = TestMachine(tmp_path / "node", image, number=3)
    node.directory.mkdir()
    try:
        node.plug_in()
        node.start("--tags", "disk=ssd", "--max-job-concurrency", "7")
        yield node
    finally:
        node.remove()


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def wrapped(path: Path, condition: str, then: str) -> str:
    """A program that is flynn-host, but does something else first when a shell condition holds."""
    return program(path, f'#!/bin/bash\nif {condition}; then\n{then}\nfi\nexec {BIN / "flynn-host"} "$@"\n')


ON_TRIAL, IN_EARNEST = '[ -n "$FLYNN_HOST_TRIAL" ]', '[ -z "$FLYNN_HOST_TRIAL" ]'


async def updated(host: HostClient, command: HostCommand) -> HostStatus:
    """Ask for an update and wait until one program or the other serves."""
    before = await host.status()
    await host.update(command)
    found = before

    async def over() -> bool:
        nonlocal found
        found = await host.status()
        return found.update is not None and found.update != before.update

    await eventually(over, 60)
    return found


def logged(node: TestMachine, job_id: str) -> list[str]:
    """Every line of a job in the log of its app."""
    content = (node.directory / "log" / f"{APP}.log").read_bytes().splitlines()
    records = [found for line in content if (found := record.decode(line)) is not None]
    return [found.text.decode() for found in records if found.of_job(job_id.encode())]


def numbers(node: TestMachine, job_id: str) -> list[int]:
    lines = logged(node, job_id)
    assert [line for line in lines if not re.fullmatch(r"line \d+", line)] == []
    return [int(line.split()[1]) for line in lines]


async def test_an_update_under_load_loses_no_line_no_job_and_refuses_nobody(
    node: TestMachine, image: Mountspec, tmp_path: Path
) -> None:
    loud, halves = job(image, LOAD), job(image, HALVES, disable_log=False)
    async with node.client() as host:
        await node.configure(host)
        for wanted in (loud, halves):
            await host.add_job(wanted)
        await eventually(lambda: _prints(host, halves.id, ""))
        before, status = {j.id: await host.job(j.id) for j in (loud, halves)}, await host.status()

        refused: list[str] = []
        asked = 0
        over = asyncio.Event()

        async def ask() -> None:
            nonlocal asked
            while not over.is_set():
                try:
                    async with node.client() as newcomer:
                        await newcomer.status()
                        asked += 1
                except ApiError as error:
                    refused.append(repr(error))
                await asyncio.sleep(0.01)

        asking = asyncio.gather(*(ask() for _ in range(3)))
        new = wrapped(tmp_path / "flynn-host-new", "false", ":")
        after = await updated(host, HostCommand(path=new))
        over.set()
        await asking
        assert after.update is not None and (after.update.error, after.update.path) == ("", new)
        assert (after.pid, after.flags, after.tags) == (status.pid, status.flags, {"disk": "ssd"})
        assert Path(f"/proc/{after.pid}/cmdline").read_bytes().split(b"\0")[1] == os.fsencode(BIN / "flynn-host")
        assert refused == [] and asked > 20
        for wanted in (loud, halves):
            found = await host.job(wanted.id)
            assert (found.status, found.pid) == (JobStatus.RUNNING, before[wanted.id].pid)

        (node.root_of(before[halves.id].pid) / "tmp/go").touch()
        await eventually(lambda: _prints(host, halves.id, "begun and ended"))
        assert await output(host, halves.id) == "begun and ended\n"
        await host.stop_job(loud.id)
        lines = numbers(node, loud.id)
        assert lines == list(range(1, len(lines) + 1)) and len(lines) > 1000
        await host.stop_job(halves.id)
        # Nothing of the programs before is left: no second zygote, no open listener of somebody else.
        assert node.children(after.pid) == ["flynn-zygote"]


async def test_programs_that_do_not_prove_themselves_leave_the_daemon_as_it_was(
    node: TestMachine, image: Mountspec, tmp_path: Path
) -> None:
    wanted = job(image, LOAD)
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        before = await host.status()
        for path, text in (
            ("/bin/true", "ended with 0 instead of being ready"),
            (program(tmp_path / "exits", "#!/bin/sh\necho no luck >&2\nexit 3\n"), "ended with 3 .*: no luck"),
            (program(tmp_path / "garbage", "#!/no/such/interpreter\n"), "ended with 127"),
            (wrapped(tmp_path / "lies", ON_TRIAL, "printf '{}' >&$FLYNN_HOST_TRIAL; exit 1"), "ended with 1"),
        ):
            with pytest.raises(PreconditionFailed, match=text):
                await host.update(HostCommand(path=path))
            assert (status := await host.status()).update is not None and status.update.path == path
            assert re.search(text, status.update.error, re.DOTALL)
        with pytest.raises(PreconditionFailed, match="No such option '--nonsense'"):
            await host.update(HostCommand(args=["daemon", "--nonsense"]))
        for command in (HostCommand(path="flynn-host"), HostCommand(path="/etc/passwd"), HostCommand(args=["ps"])):
            with pytest.raises(ValidationError):
                await host.update(command)
        assert node.children(before.pid) == ["flynn-zygote"]
        await host.stop_job(wanted.id)
        lines = numbers(node, wanted.id)
        assert lines == list(range(1, len(lines) + 1))


async def test_a_program_that_hangs_on_trial_is_given_up(node: TestMachine, tmp_path: Path) -> None:
    await asyncio.to_thread(node.end)
    await asyncio.to_thread(node.start, env={"FLYNN_HOST_FAULT": "none"})  # time limits are shorter then
    async with node.client() as host:
        before = await host.status()
        hangs = wrapped(tmp_path / "hangs", ON_TRIAL, "sleep 1000")
        trying = asyncio.ensure_future(host.update(HostCommand(path=hangs)))
        await eventually(lambda: _has_child(before.pid, "hangs"))
        # Meanwhile nobody else's is tried.
        with pytest.raises(Conflict, match="an update is going on"):
            await host.update(HostCommand())
        with pytest.raises(PreconditionFailed, match="was not ready within 3 seconds"):
            await trying
        assert node.children(before.pid) == ["flynn-zygote"]
        assert (await host.status()).pid == before.pid


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        pytest.param(
            "FLYNN_CONFIG_DIR=/nowhere", "--external-ip: must be given", id="its configuration is wrong after all"
        ),
        pytest.param("export FLYNN_HOST_FAULT=restored:raise", "a fault was asked for", id="its start fails"),
        pytest.param("export FLYNN_HOST_FAULT=restored:hang", "not ready within", id="its start hangs"),
    ],
)
async def test_a_program_that_fails_after_its_trial_gives_way_to_the_one_before(
    node: TestMachine, image: Mountspec, tmp_path: Path, then: str, reason: str
) -> None:
    wanted = job(image, LOAD)
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        before = await host.status()
        bad = wrapped(tmp_path / "bad", IN_EARNEST, then)
        after = await updated(host, HostCommand(path=bad))
        assert after.pid == before.pid and after.flags == before.flags
        assert after.update is not None and reason in after.update.error and after.update.path == bad
        assert (await host.job(wanted.id)).status is JobStatus.RUNNING
        await host.stop_job(wanted.id)
        lines = numbers(node, wanted.id)
        assert lines == list(range(1, len(lines) + 1))
        # And it can be updated still.
        again = await updated(host, HostCommand())
        assert again.update is not None and again.update.error == "" and again.pid == before.pid


@pytest.mark.parametrize("moment", [0.0, 0.15, 0.4, 0.8, 1.4, 2.2])
async def test_killed_in_the_middle_of_an_update(
    node: TestMachine, image: Mountspec, tmp_path: Path, moment: float
) -> None:
    wanted, second = job(image, LOAD), job(image, "true")
    async with node.client() as host:
        await node.configure(host)
        await host.add_job(wanted)
        await eventually(lambda: _logs(node, wanted.id))
        before = await host.job(wanted.id)
        asking = asyncio.ensure_future(host.update(HostCommand()))
        await asyncio.sleep(moment)
        await asyncio.to_thread(node.end, signal.SIGKILL)
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(node.start)
    async with node.client() as host:
        found = await host.job(wanted.id)
        assert (found.status, found.pid) == (JobStatus.RUNNING, before.pid)
        await host.add_job(second)
        assert await ended(host, second.id) is JobStatus.DONE
        assert node.children((await host.status()).pid) == ["flynn-zygote"]
        await host.stop_job(wanted.id)
        # SIGKILL may take what had been read from the pipe that very moment, and no line twice.
        lines = [int(line.split()[1]) for line in logged(node, wanted.id) if re.fullmatch(r"line \d+", line)]
        assert lines == sorted(set(lines)) and len(lines) > 100


async def _prints(host: HostClient, job_id: str, text: str) -> bool:
    if (await host.job(job_id)).status is JobStatus.STARTING:
        return False
    return text in await output(host, job_id)


async def _logs(node: TestMachine, job_id: str) -> bool:
    return (node.directory / "log" / f"{APP}.log").exists() and len(logged(node, job_id)) > 9


async def _has_child(pid: int, name: str) -> bool:
    return name in TestMachine.children(pid)
