"""The operator's command line on a node: what it prints, what it exits with, and what it says to do next."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import tarfile
import termios
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from flynn.host.cli.find import add_command
from flynn.host.cli.fix import Start, again, missing
from flynn.host.client import HostClient
from flynn.http.server import Api, Request, listen
from flynn.identity.access import INSIDERS
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, ImageManifest, Layer, Rootfs
from flynn.types.codec import encode
from flynn.types.errors import NotFound
from flynn.types.host import ActiveJob, ContainerConfig, HostJob, JobStatus, Mountspec
from flynn.types.instance import Instance, ServiceMeta

from .machine import META, TestMachine, eventually

NOW = datetime(2026, 1, 5, tzinfo=UTC)


def record(
    host: str, app: str, process_type: str, age: int = 0, status: JobStatus = JobStatus.DONE, **env: str
) -> ActiveJob:
    meta = {"flynn-controller.app_name": app, "flynn-controller.type": process_type}
    job = HostJob(id=f"{host}-{app}-{age}", metadata=meta, config=ContainerConfig(env=env))
    return ActiveJob(job=job, host_id=host, status=status, created_at=NOW - timedelta(seconds=age))


def listed(*jobs: ActiveJob) -> dict[str, dict[str, ActiveJob]]:
    hosts: dict[str, dict[str, ActiveJob]] = {"a": {}, "b": {}, "c": {}}
    for job in jobs:
        hosts[job.host_id][job.job.id] = job
    return hosts


DISCOVERD, WEB = ("discoverd", "app"), ("controller", "web")


def test_what_must_be_everywhere_is_started_where_it_is_not() -> None:
    """From the newest record of the host itself, else from another's."""
    up = record("a", *DISCOVERD, status=JobStatus.RUNNING)
    old, new = record("b", *DISCOVERD, age=9), record("b", *DISCOVERD, age=5)
    starts = missing(listed(up, old, new), DISCOVERD, everywhere=True)
    assert starts == [Start("b", *DISCOVERD, new), Start("c", *DISCOVERD, up)]


def test_what_must_be_somewhere_is_started_where_it_was_if_it_is_nowhere() -> None:
    one, two = record("a", *WEB), record("b", *WEB, age=3)
    assert missing(listed(one, two), WEB, everywhere=False) == [Start("a", *WEB, one), Start("b", *WEB, two)]
    up = record("c", *WEB, status=JobStatus.STARTING)
    assert missing(listed(one, two, up), WEB, everywhere=False) == []
    assert missing(listed(), WEB, everywhere=False) == []


def test_a_job_started_again_is_a_new_one_of_its_own() -> None:
    old = record("a", *DISCOVERD, FLYNN_JOB_ID="a-old", OTHER="x")
    job = again(Start("b", *DISCOVERD, old), "b-new", NOW)
    assert (job.id, job.config.env) == ("b-new", {"FLYNN_JOB_ID": "b-new", "OTHER": "x"})
    assert job.metadata == old.job.metadata


PEM = "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n"


def test_the_client_is_told_of_the_newest_controller_and_the_routers_certificate() -> None:
    old = record("a", *WEB, 9, JobStatus.RUNNING, AUTH_KEY="old", DEFAULT_ROUTE_DOMAIN="old.example")
    new = record("b", *WEB, 1, JobStatus.RUNNING, AUTH_KEY="key,older", DEFAULT_ROUTE_DOMAIN="new.example")
    down = record("c", *WEB, 0, JobStatus.CRASHED, AUTH_KEY="down", DEFAULT_ROUTE_DOMAIN="down.example")
    router = record("a", "router", "app", 3, JobStatus.RUNNING, TLSCERT=PEM)
    hint, blank, command = add_command([new, old, down, router]).splitlines()
    pin = base64.b64encode(hashlib.sha256(bytes((0, 1, 2))).digest()).decode()
    assert (hint[0], blank, command) == ("#", "", f"flynn cluster add -p {pin} default new.example key")
    plain = record("a", "router", "app", 3, JobStatus.RUNNING)
    assert add_command([new, plain]).splitlines()[-1] == "flynn cluster add default new.example key"
    with pytest.raises(click.ClickException, match="no controller web job runs"):
        add_command([down, router])


# On a real node

root = pytest.mark.root
slow = pytest.mark.slow


def job(image: Mountspec, script: str, **meta: str) -> HostJob:
    config = ContainerConfig(args=["sh", "-c", script], env={"SECRET": "s3cret-value", "PLAIN": "p"})
    return HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata={**META, **meta}, config=config)


async def tool(machine: TestMachine, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, machine.command(*arguments), env={**machine.environment, **more.pop("env", {})},
        capture_output=True, text=True, timeout=60, **more,
    )  # fmt: skip


@pytest.fixture
async def running(host: HostClient, image: Mountspec) -> AsyncIterator[HostJob]:
    wanted = job(image, "echo hello; echo oops >&2; while true; do sleep 0.1; done")
    await host.add_job(wanted)

    async def runs() -> bool:
        return (await host.job(wanted.id)).status is JobStatus.RUNNING

    await eventually(runs)
    yield wanted
    await host.stop_job(wanted.id)


@root
@slow
async def test_jobs_are_listed_in_every_form(machine: TestMachine, running: HostJob) -> None:
    table = (await tool(machine, "ps")).stdout.splitlines()
    columns = [word.strip() for word in table[0].split("  ") if word.strip()]
    assert columns == ["ID", "STATE", "CREATED", "CONTROLLER APP", "CONTROLLER TYPE", "ERROR"]
    (row,) = [line for line in table if line.startswith(running.id)]
    assert row.split()[1] == "running"
    assert row.split()[-2:] == ["shop", "web"]
    assert running.id in (await tool(machine, "ps", "-q")).stdout.splitlines()
    template = '{{.Job.ID}} {{metadata "flynn-controller.app_name"}} {{.Status}}{{if .Error}} !{{end}}'
    assert f"{running.id} shop running" in (await tool(machine, "ps", "-q", "-f", template)).stdout.splitlines()
    (found,) = [
        one for one in json.loads((await tool(machine, "ps", "--json")).stdout) if one["job"]["id"] == running.id
    ]
    assert found["status"] == 1
    bad = await tool(machine, "ps", "-f", "{{.Nope}}")
    assert (bad.returncode, bad.stderr) == (1, "Error: -f: can't evaluate field Nope\n")


@root
@slow
async def test_a_job_is_shown_with_its_secrets_hidden_on_request(machine: TestMachine, running: HostJob) -> None:
    shown = (await tool(machine, "inspect", running.id)).stdout
    lines = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line)
    assert lines["ID"].strip() == running.id
    assert lines["Status"].strip() == "running"
    assert lines["ENV[SECRET]"].strip() == "s3cret-value"
    redacted = (await tool(machine, "inspect", "--redact-env=SECRET", running.id)).stdout
    assert "s3cret-value" not in redacted
    assert "XXXREDACTEDXXX" in redacted
    assert "ENV[" not in (await tool(machine, "inspect", "--omit-env", running.id)).stdout
    gone = await tool(machine, "inspect", "node1-nope")
    assert (gone.returncode, gone.stderr) == (1, "Error: no such job; `flynn-host ps -a` lists them\n")
    odd = await tool(machine, "inspect", "nodash")
    assert (odd.returncode, odd.stderr) == (1, "Error: could not parse nodash: invalid ID\n")
    away = await tool(machine, "inspect", "node9-x")
    assert (away.returncode, away.stderr) == (1, "Error: no host with id node9; `flynn-host list` shows them\n")


@root
@slow
async def test_logs_signals_and_the_end(machine: TestMachine, host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "trap 'echo usr1' USR1; echo a; echo b >&2; echo c; while true; do sleep 0.05; done")
    await host.add_job(wanted)

    async def logged(text: str) -> bool:
        return text in (await tool(machine, "log", wanted.id)).stdout

    await eventually(lambda: logged("c"))
    split = await tool(machine, "log", "--split-stderr", wanted.id)
    assert (split.stdout, split.stderr) == ("a\nc\n", "b\n")
    assert (await tool(machine, "log", "--lines", "1", wanted.id)).stdout in ("c\n", "b\n")
    sent = await tool(machine, "signal", wanted.id, str(int(signal.SIGUSR1)))
    assert sent.stdout == f"sent signal 10 to {wanted.id} successfully\n"
    await eventually(lambda: logged("usr1"))
    stopped = await tool(machine, "stop", wanted.id, "nodash", "node1-nope")
    assert stopped.stdout == f"{wanted.id} stopped\n"
    assert stopped.returncode == 1
    assert "could not parse nodash: invalid ID\n" in stopped.stderr
    assert "could not stop job node1-nope: " in stopped.stderr
    assert stopped.stderr.endswith("Error: could not stop all jobs\n")


@root
@slow
async def test_a_command_runs_with_limits_a_volume_and_more_rights(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    artifact = artifact_of(image)
    script = "ulimit -n; touch /data/x && echo kept; grep CapEff /proc/self/status"
    options = ("--limits", "max_fd=1k,memory=64MB", "--volume", "/data", "--extra-caps", "net_admin")
    done = await tool(machine, "run", *options, artifact, "sh", "-c", script, stdin=subprocess.DEVNULL)
    fds, kept, capabilities = done.stdout.splitlines()
    assert (fds, kept, done.returncode) == ("1000", "kept", 0)
    assert int(capabilities.split()[1], 16) & 1 << 12  # CAP_NET_ADMIN
    assert all(not info.meta for info in await host.volumes() if info.type == "data")
    bad = await tool(machine, "run", "--limits", "max_fd", artifact, "true")
    assert bad.returncode == 1
    assert 'invalid resource limit: "max_fd"' in bad.stderr
    none = await tool(machine, "run", "/nonexistent", "true")
    assert none.returncode == 1
    assert "is no artifact" in none.stderr


def artifact_of(image: Mountspec) -> str:
    layer = Layer(id=image.id, type=SQUASHFS_TYPE, length=image.size, hashes=image.hashes)
    manifest = ImageManifest(rootfs=[Rootfs(layers=[layer])])
    return encode(Artifact(type="flynn", manifest=manifest.document(), layer_url_template=image.url)).decode()


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@root
@slow
async def test_a_command_on_a_terminal_has_its_size_its_keys_and_its_status(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    ours, theirs = pty.openpty()
    resize(theirs, 30, 100)
    script = "trap 'stty size' WINCH; stty size; read a; echo got $a; read b; echo got $b; sleep 60; echo late"
    process = await asyncio.create_subprocess_exec(
        *machine.command("run", artifact_of(image), "sh", "-c", script), env=machine.environment,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 1000)

    async def see(text: bytes) -> None:
        async with asyncio.timeout(30):
            await asyncio.to_thread(until, text)

    try:
        await see(b"30 100\r\n")
        os.write(ours, b"one\n")
        await see(b"got one\r\n")
        os.write(ours, b"two\n")
        await see(b"got two\r\n")
        resize(ours, 40, 120)
        os.write(ours, b"\x03")  # raw: it is the job's terminal that makes a signal of it
        async with asyncio.timeout(30):
            assert await process.wait() == 130
        assert b"late" not in seen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


@root
@slow
async def test_a_signal_to_the_tool_is_passed_on(machine: TestMachine, host: HostClient, image: Mountspec) -> None:
    script = "trap 'echo asked; exit 6' TERM; echo up; while true; do sleep 0.05; done"
    process = await asyncio.create_subprocess_exec(
        *machine.command("run", artifact_of(image), "sh", "-c", script), env=machine.environment,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert await process.stdout.readline() == b"asked\n"
        assert await process.wait() == 6


@root
@slow
async def test_hosts_tags_ports_and_sinks_for_people_and_for_scripts(machine: TestMachine, host: HostClient) -> None:
    assert (await tool(machine, "tags", "set", "node1", "disk=ssd", "fast")).returncode == 0
    assert (await tool(machine, "tags")).stdout == "HOST   TAGS\nnode1  disk=ssd fast=true\n"
    assert json.loads((await tool(machine, "tags", "--json")).stdout) == {"node1": {"disk": "ssd", "fast": "true"}}
    await tool(machine, "tags", "del", "node1", "disk", "fast")
    address = f"{machine.ip}:1113"
    assert (await tool(machine, "list")).stdout == f"ID     {'ADDR':{len(address)}}  RAFT STATUS\nnode1  {address}\n"
    assert json.loads((await tool(machine, "list", "--json")).stdout)[0]["id"] == "node1"
    assert (await tool(machine, "resource-check", "9")).stdout == "all ports are free\n"
    taken = await tool(machine, "resource-check", "--json", "1113", "9")
    assert (taken.returncode, json.loads(taken.stdout)) == (1, {"ports": [{"port": 1113, "proto": "tcp"}]})
    assert "Conflicting resources found: tcp:1113" in taken.stderr
    assert (await tool(machine, "log-sink", "list", "node1")).stdout == "ID  KIND  CONFIG  HOST MANAGED\n"
    assert json.loads((await tool(machine, "log-sink", "list", "--json", "node1")).stdout) == []
    assert json.loads((await tool(machine, "status", "--json")).stdout)["id"] == "node1"


@root
@slow
async def test_help_and_mistakes(machine: TestMachine) -> None:
    whole = await tool(machine, "help")
    assert whole.returncode == 0
    commands = (
        "daemon init bootstrap ps inspect log stop signal-job run list tags volume download promote demote "
        "resource-check collect-debug-info cli-add-command version destroy-volumes fix discover log-sink help"
    )
    for command in commands.split():
        assert f"  {command} " in whole.stdout, command
        shown = await tool(machine, "help", command)
        assert shown.stdout.startswith(f"Usage: flynn-host {command}"), command
    assert (await tool(machine, "help", "tags", "set")).stdout.startswith("Usage: flynn-host tags set")
    for wrong in (("nope",), ("help", "nope")):
        unknown = await tool(machine, *wrong)
        assert unknown.returncode == 1
        assert unknown.stderr.startswith('ERROR: "nope" is not a valid command\n\nUsage: flynn-host')
    usage = await tool(machine, "inspect")
    assert (usage.returncode, usage.stderr.splitlines()[0]) == (1, "Usage: flynn-host inspect [OPTIONS] ID")


@asynccontextmanager
async def directory(machine: TestMachine, services: dict[str, list[Instance]]) -> AsyncIterator[str]:
    """As much of discoverd as `discover` asks."""
    api = Api("discoverd")

    async def instances(request: Request) -> list[Instance]:
        return services.get(request.path("name"), [])

    async def leader(request: Request) -> Instance:
        found = services.get(request.path("name"), [])
        if not found:
            raise NotFound("no leader")
        return found[0]

    async def meta(request: Request) -> ServiceMeta:
        if request.path("name") not in services:
            raise NotFound("no meta")
        return ServiceMeta(data={"a": 1}, index=7)

    for name, handler in (("instances", instances), ("leader", leader), ("meta", meta)):
        api.route("GET", f"/services/{{name}}/{name}", handler, allow=INSIDERS)
    key = (machine.config / "host.key").read_text().strip()
    async with listen(api, machine.outside, 0, key=key) as (host, port):
        yield f"http://{host}:{port}"


@root
@slow
async def test_services_are_discovered(machine: TestMachine, host: HostClient) -> None:
    found = Instance.at("10.0.0.1:80", "tcp", {"x": "y"})
    async with directory(machine, {"web": [found]}) as url:
        env = {"DISCOVERD": url}
        shown = await tool(machine, "discover", "web", "none", env=env)
        assert shown.stdout == f"SERVICE  ID{' ' * 32}ADDR\nweb      {found.id}  10.0.0.1:80\n"
        (web, none) = json.loads((await tool(machine, "discover", "--json", "web", "none", env=env)).stdout)
    assert (web["Name"], web["Leader"]["addr"], web["Instances"][0]["id"]) == ("web", "10.0.0.1:80", found.id)
    assert web["Meta"] == {"Data": {"a": 1}, "index": 7}
    assert (none["Leader"], none["Instances"], none["Meta"]) == (None, [], None)
    dead = await tool(machine, "discover", "web", env={"DISCOVERD": f"{machine.ip}:1"})
    assert dead.returncode == 1


@root
@slow
async def test_what_is_missing_is_started_again_from_its_records(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    none = await tool(machine, "fix", "-n", "1", "--timeout", "1")
    assert (none.returncode, none.stderr) == (
        1, "Error: no record of a discoverd job on any host; see: flynn-host bootstrap\n",
    )  # fmt: skip
    few = await tool(machine, "fix", "-n", "3", "--timeout", "1")
    assert few.stderr == "Error: expected 3 hosts, found 1 (node1); name all with --peer-ips\n"
    dead = await tool(machine, "fix", "-n", "2", "--peer-ips", "127.0.0.99", "--timeout", "1")
    assert "the host at 127.0.0.99 does not answer" in dead.stderr
    names = {"flynn-controller.app_name": "", "flynn-controller.type": "app"}
    gone = {}
    for app in ("discoverd", "flannel"):
        wanted = job(image, "while true; do sleep 0.1; done", **{**names, "flynn-controller.app_name": app})
        await host.add_job(wanted)
        await host.stop_job(wanted.id)
        gone[app] = wanted.id
    fixed = await tool(machine, "fix", "-n", "1", "--timeout", "1")
    started = [line.split() for line in fixed.stdout.splitlines()]
    assert [line[:5] for line in started] == [[app, "started", "on", "node1", "as"] for app in ("discoverd", "flannel")]
    assert "discoverd has no leader after 1 s; see: flynn-host ps -a" in fixed.stderr  # it is only called discoverd
    for line in started:
        assert (await host.job(line[5])).status in (JobStatus.STARTING, JobStatus.RUNNING)
    again_ = await tool(machine, "fix", "-n", "1", "--timeout", "1")
    assert again_.stdout == "discoverd runs\nflannel runs\n"
    for line in started:
        await host.stop_job(line[5])


@root
@slow
async def test_a_dead_daemon_is_said_and_can_be_looked_into(
    machine: TestMachine, host: HostClient, running: HostJob, tmp_path: Path
) -> None:
    machine.end(signal.SIGKILL)
    try:
        dead = await tool(machine, "ps")
        assert dead.returncode == 1
        assert dead.stderr.endswith("The daemon of this machine does not answer; see: systemctl status flynn-host\n")
        assert "Traceback" not in dead.stderr
        file = tmp_path / "debug.tar.gz"
        log = str(machine.directory / "log")
        made = await tool(machine, "collect-debug-info", "--tarball", "--log-dir", log, "--filename", str(file))
        assert (made.returncode, made.stdout) == (0, f"{file}\n")
        with tarfile.open(file) as archive:
            jobs = archive.extractfile("flynn-host-debug/1-jobs.json")
            assert jobs is not None
            text = jobs.read().decode()
        assert running.id in text
        assert "s3cret-value" not in text
    finally:
        machine.start()
    assert (await host.job(running.id)).status is JobStatus.RUNNING
