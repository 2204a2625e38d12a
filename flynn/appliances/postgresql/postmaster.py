"""A PostgreSQL server as a child process: making its data directory, starting, stopping, finding strays.

The server runs as its own user, never as root, and is killed by the kernel when its parent dies: a server whose daemon
is gone would go on without anybody who tells the cluster about it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flynn.appliances.sirenia.database import DatabaseError
from flynn.appliances.sirenia.identity import sync_directory

log = logging.getLogger(__name__)

# How a server is asked to stop, ever more firmly: disconnect everybody and shut down, abort (the next start replays
# the log), kill. The first may have to write out what is in memory.
STOP_SIGNALS = ((signal.SIGINT, 15.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))


@dataclass(frozen=True, slots=True)
class Installation:
    """The server's programs and the system user they run as; `user` None = whoever we are."""

    bin: Path
    user: str | None

    @classmethod
    def find(cls, bin: Path) -> Installation:
        """Root runs the server as `postgres`, anybody else as themselves."""
        return cls(bin, "postgres" if os.geteuid() == 0 else None)

    def command(self, program: str, *arguments: str) -> list[str]:
        """The command line that runs `program` as the server's user and bound to our life."""
        user = ["--reuid", self.user, "--regid", self.user, "--init-groups"] if self.user else []
        # SIGINT to the server means: shut down at once, but orderly.
        return ["setpriv", *user, "--pdeathsig", "INT", "--", str(self.bin / program), *arguments]

    def own(self, path: Path) -> None:
        """Give `path` to the server's user."""
        if self.user:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    @property
    def extension_whitelist(self) -> bool:
        return (self.bin.parent / "lib/pgextwlist.so").exists()


async def ensure_data_directory(installation: Installation, data: Path) -> None:
    """Make an empty cluster in `data` unless there is one. A crash on the way leaves nothing that looks like one."""
    if (data / "PG_VERSION").exists():
        return
    if data.exists():
        try:
            data.rmdir()
        except OSError as error:
            raise DatabaseError(f"{data} is neither empty nor a database cluster: nothing in it is touched") from error
    beside = data.with_name(f"{data.name}.new")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(mode=0o700)
    installation.own(beside)
    log.info("making a new database cluster", extra={"data": data})
    arguments = ["--pgdata", str(beside), "--username=postgres", "--encoding=UTF-8", "--locale=C.UTF-8"]
    process = await asyncio.create_subprocess_exec(
        # `reject` until pg_hba.conf is replaced by ours. Checksums cost next to nothing beside `wal_log_hints`.
        *installation.command("initdb", *arguments, "--data-checksums", "--auth=reject"),
        cwd=data.parent,
        env=environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise DatabaseError(f"initdb failed with status {process.returncode}: {output.decode(errors='replace')}")
    beside.rename(data)
    sync_directory(data.parent)


class Postmaster:
    """A running server."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, installation: Installation, data: Path) -> Postmaster:
        """Start a server on `data`. Its log goes where ours goes. It may take a while until it lets anybody in."""
        await _end_stray(data)
        command: Sequence[str] = installation.command("postgres", "-D", str(data))
        process = await asyncio.create_subprocess_exec(
            *command, cwd="/", env=environment(), stdin=asyncio.subprocess.DEVNULL
        )
        return cls(process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def exited(self) -> int:
        """Wait for the end of the server and return its status (negative: the signal that killed it)."""
        return await self._process.wait()

    def reload(self) -> None:
        """Read configuration and certificate again."""
        self._process.send_signal(signal.SIGHUP)

    async def stop(self) -> None:
        for signum, seconds in STOP_SIGNALS:
            if not self.running:
                return
            self._process.send_signal(signum)
            try:
                async with asyncio.timeout(seconds):
                    await self._process.wait()
            except TimeoutError:
                log.warning("the server does not stop", extra={"signal": signum.name, "seconds": seconds})


async def _end_stray(data: Path) -> None:
    """Make sure that no server of an earlier life works on `data`, then remove its lock file.

    The file's pid may be anybody's by now: in a new container the numbers start again. A server is known by its working
    directory, which is the data directory.
    """
    lock = data / "postmaster.pid"
    try:
        pid = int(lock.read_text().split("\n", 1)[0])
    except FileNotFoundError:
        return
    except ValueError:
        pid = 0
    for signum, seconds in STOP_SIGNALS[1:]:
        if not _works_on(pid, data):
            break
        log.warning("ending a stray server", extra={"pid": pid, "signal": signum.name})
        os.kill(pid, signum)
        for _ in range(int(seconds * 10)):
            if not _works_on(pid, data):
                break
            await asyncio.sleep(0.1)
    if _works_on(pid, data):
        raise DatabaseError(f"another server with pid {pid} works on {data} and cannot be ended")
    lock.unlink(missing_ok=True)


def _works_on(pid: int, data: Path) -> bool:
    try:
        return pid > 1 and Path(f"/proc/{pid}/cwd").resolve() == data.resolve()
    except OSError:
        return False


def environment() -> dict[str, str]:
    """Nothing of ours: PG* variables would steer the server's programs, and passwords do not belong there."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "TZ": "UTC"}
