"""`flynn run`: bytes, signals, terminal and exit status, against a server that is the job itself."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flynn.host import attach
from flynn.http.connection import RawConnection
from flynn.http.server import Api, Request, listen
from flynn.identity import ANYONE
from flynn.types.job import Job, NewJob
from flynn.types.release import Release
from tests.cli.conftest import FLYNN, User

pytestmark = pytest.mark.slow  # every test is a process

ENV = {"FLYNN_POSTGRES": "pg-app", "PGHOST": "h", "PGUSER": "u", "PGPASSWORD": "p", "PGDATABASE": "d"}
Behaviour = Callable[[RawConnection], Awaitable[None]]


async def send(connection: RawConnection, *frames: attach.Frame) -> None:
    for frame in frames:
        connection.write(attach.encode(frame))
    await connection.drain()


async def stdin_of(connection: RawConnection) -> bytes:
    received = b""
    while isinstance(frame := await attach.read_client_frame(connection), attach.Data) and frame.data:
        received += frame.data
    return received


@dataclass
class JobServer:
    """A controller that knows one app and runs `behaviour` as its jobs."""

    behaviour: Behaviour
    meta: dict[str, str] = field(default_factory=dict)
    asked: list[NewJob] = field(default_factory=list)

    def api(self) -> Api:
        async def release(request: Request) -> Release:
            return Release(id=f"release-of-{request.path('id')}", artifacts=["a"], env=ENV, meta=self.meta)

        async def run(request: Request) -> Job | None:
            self.asked.append(await request.body(NewJob))
            if not request.header("Upgrade"):
                return Job(id="h1-u1", uuid="u1")
            connection = await request.upgrade(attach.PROTOCOL)
            async with connection:
                await self.behaviour(connection)
            return None

        api = Api("controller")
        api.route("GET", "/apps/{id}/release", release, allow=ANYONE)
        api.route("GET", "/releases/{id}", release, allow=ANYONE)
        api.route("POST", "/apps/{id}/jobs", run, allow=ANYONE)
        return api


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[tuple[User, JobServer]]:
    async def echo(connection: RawConnection) -> None:
        received = await stdin_of(connection)
        out = attach.Data(attach.Stream.STDOUT, received.upper())
        await send(connection, out, attach.Data(attach.Stream.STDERR, b"!"), attach.Exit(42))

    server = JobServer(echo)
    async with listen(server.api(), "127.0.0.1", 0) as (host, port):
        user = User(tmp_path, f"http://{host}:{port}")
        user.knows()
        yield user, server


async def test_bytes_go_both_ways_and_the_exit_status_comes_back(job: tuple[User, JobServer]) -> None:
    user, server = job
    assert await user.fails("-a", "shop", "run", "cat", "-n", code=42, stdin="hello\n") == "HELLO\n!"
    (asked,) = server.asked
    assert (asked.args, asked.release_env, asked.disable_log, asked.tty) == (["cat", "-n"], True, True, False)


async def test_a_detached_job_is_only_named(job: tuple[User, JobServer]) -> None:
    user, server = job
    server.meta["git"] = "true"
    assert await user("-a", "shop", "run", "-d", "--", "ls", "-la") == "h1-u1\n"
    assert server.asked[0].args == ["/runner/init", "ls", "-la"]
    assert not server.asked[0].disable_log


async def test_a_lost_connection_is_an_error(job: tuple[User, JobServer]) -> None:
    user, server = job

    async def hang_up(connection: RawConnection) -> None:
        await send(connection, attach.Data(attach.Stream.STDOUT, b"so far\n"))

    server.behaviour = hang_up
    assert await user.fails("-a", "shop", "run", "x") == "so far\nEOF: the connection to the job was lost\n"


async def test_a_failed_job_says_why(job: tuple[User, JobServer]) -> None:
    user, server = job

    async def fail(connection: RawConnection) -> None:
        await send(connection, attach.Failure("exec: nope: not found"))

    server.behaviour = fail
    assert await user.fails("-a", "shop", "run", "nope") == "exec: nope: not found\n"


async def test_large_output_arrives_whole(job: tuple[User, JobServer]) -> None:
    user, server = job

    async def pour(connection: RawConnection) -> None:
        for _ in range(200):
            await send(connection, attach.Data(attach.Stream.STDOUT, b"x" * 10_000))
        await send(connection, attach.Exit(0))

    server.behaviour = pour
    done = await user.run("-a", "shop", "run", "x")
    assert (done.returncode, len(done.stdout)) == (0, 2_000_000), done.stdout[-100:]


async def test_a_signal_reaches_the_job_and_its_answer_is_seen(job: tuple[User, JobServer]) -> None:
    user, server = job

    async def trap(connection: RawConnection) -> None:
        await send(connection, attach.Data(attach.Stream.STDOUT, b"ready\n"))
        while not isinstance(frame := await attach.read_client_frame(connection), attach.Signal):
            pass
        text = f"got signal: {frame.number}\n".encode()
        await send(connection, attach.Data(attach.Stream.STDOUT, text), attach.Exit(7))

    server.behaviour = trap
    process = await asyncio.create_subprocess_exec(
        FLYNN, "-a", "shop", "run", "x", env=user.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert await process.stdout.read() == b"got signal: 2\n"
    assert await process.wait() == 7


async def test_a_terminal_is_raw_resized_and_restored(job: tuple[User, JobServer]) -> None:
    user, server = job
    seen: list[attach.ClientFrame] = []

    async def shell(connection: RawConnection) -> None:
        await send(connection, attach.Data(attach.Stream.STDOUT, b"$ "))
        while (frame := await attach.read_client_frame(connection)) is not None:
            seen.append(frame)
            if isinstance(frame, attach.Data) and b"\x03" in frame.data:
                await send(connection, attach.Exit(3))
                return

    server.behaviour = shell
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(secondary)
    process = await asyncio.create_subprocess_exec(
        FLYNN, "-a", "shop", "run", "bash", env={**user.env, "TERM": "xterm"}, stdin=secondary, stdout=secondary
    )
    assert await asyncio.to_thread(os.read, primary, 100) == b"$ "
    (asked,) = server.asked
    assert (asked.tty, asked.tty_columns, asked.tty_lines) == (True, 100, 30)
    assert asked.env == {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}

    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    process.send_signal(signal.SIGWINCH)
    async with asyncio.timeout(5):
        while attach.Signal(signal.SIGWINCH) not in seen:
            await asyncio.sleep(0.01)
    assert attach.Resize(50, 132) in seen

    os.write(primary, b"\x03")  # typed, not signalled: the job's terminal decides what it means
    assert await process.wait() == 3
    assert termios.tcgetattr(secondary) == before
    os.close(primary)
    os.close(secondary)


async def test_psql_runs_with_the_databases_release_and_the_apps_password(job: tuple[User, JobServer]) -> None:
    user, server = job
    await user.fails("-a", "shop", "pg", "psql", "--", "-c", "select 1", code=42)
    (asked,) = server.asked
    assert asked.release == "release-of-pg-app"
    assert asked.args == ["psql", "-c", "select 1"]
    assert asked.env["PAGER"] == "less"
    assert {name: asked.env[name] for name in ("PGHOST", "PGUSER", "PGPASSWORD", "PGDATABASE")} == {
        "PGHOST": "h",
        "PGUSER": "u",
        "PGPASSWORD": "p",
        "PGDATABASE": "d",
    }


async def test_a_dump_that_fails_leaves_no_file_and_one_that_succeeds_is_whole(job: tuple[User, JobServer]) -> None:
    user, server = job
    await user.fails("-a", "shop", "pg", "dump", "-f", "latest.dump", code=42)
    assert not list(user.home.glob("latest*"))

    async def dump(connection: RawConnection) -> None:
        assert await stdin_of(connection) == b""
        await send(connection, attach.Data(attach.Stream.STDOUT, b"data"), attach.Exit(0))

    server.behaviour = dump
    assert await user("-a", "shop", "pg", "dump", "-f", "latest.dump") == ""
    assert (user.home / "latest.dump").read_bytes() == b"data"
    assert server.asked[-1].args == ["pg_dump", "--format=custom", "--no-owner", "--no-acl"]


async def test_a_restore_sends_the_file(job: tuple[User, JobServer]) -> None:
    user, server = job
    (user.home / "in.dump").write_bytes(b"some data")
    assert await user.fails("-a", "shop", "pg", "restore", "-f", "in.dump", "-j", "4", code=42) == "SOME DATA!"
    assert server.asked[-1].data
    assert server.asked[-1].args[:2] == ["bash", "-c"]
