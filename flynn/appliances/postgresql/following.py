"""Making a data directory that follows another server: in place, rewound, or copied.

in place    it was a standby before; PostgreSQL goes on where it was, also across timelines
rewound     it was a primary, or went another way: `pg_rewind` takes back what the upstream does not have
copied      everything else: a new copy is made beside the old directory, which goes when the copy is complete
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from flynn.appliances.postgresql.postmaster import Installation, environment
from flynn.appliances.sirenia.cluster_state import Lineage
from flynn.appliances.sirenia.database import DatabaseError
from flynn.appliances.sirenia.identity import sync_directory
from flynn.types.codec import decode, encode
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

SIGNAL = "standby.signal"
REPORT_BYTES = 2000


@dataclass(slots=True)
class DataDirectory:
    """`db` on the volume `volume`, and beside it the lineage of what is in it."""

    volume: Path
    installation: Installation
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)  # what takes long gives up

    @property
    def path(self) -> Path:
        return self.volume / "db"

    @property
    def exists(self) -> bool:
        return (self.path / "PG_VERSION").exists()

    @property
    def is_standby(self) -> bool:
        return (self.path / SIGNAL).exists()

    def be_standby(self) -> None:
        """At its next start the server only replays. A promotion removes the file."""
        signal = self.path / SIGNAL
        signal.touch(mode=0o600)
        self.installation.own(signal)
        sync_directory(self.path)

    # --- lineage

    @property
    def lineage(self) -> Lineage | None:
        try:
            return decode((self.volume / "lineage.json").read_bytes(), Lineage)
        except (FileNotFoundError, ApiError, json.JSONDecodeError):
            return None

    def record(self, lineage: Lineage) -> None:
        beside = self.volume / ".lineage.json.new"
        with beside.open("wb") as file:
            file.write(encode(lineage))
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self.volume / "lineage.json")
        sync_directory(self.volume)

    def _forget_lineage(self) -> None:
        (self.volume / "lineage.json").unlink(missing_ok=True)
        sync_directory(self.volume)

    # --- from another server; ours is stopped

    async def rewind(self, source: str) -> None:
        """Raises DatabaseError; the directory may then be good for nothing but to be replaced by a copy."""
        self._forget_lineage()
        (self.path / "postmaster.pid").unlink(missing_ok=True)
        log.info("rewinding", extra={"data": self.path})
        output = await self._run("pg_rewind", "--target-pgdata", str(self.path), "--source-server", source)
        log.info("rewound", extra={"report": output[-REPORT_BYTES:].replace("\n", "; ")})
        self.be_standby()

    async def copy(self, source: str) -> None:
        """Raises DatabaseError; then the old directory is what it was."""
        copy, old = self.volume / "db.copy", self.volume / "db.old"
        for leftover in (copy, old):
            await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)
        copy.mkdir(mode=0o700)
        self.installation.own(copy)
        log.info("copying the upstream", extra={"data": copy})
        await self._run(
            "pg_basebackup", "--pgdata", str(copy), "--dbname", source, "--wal-method=stream", "--checkpoint=fast"
        )  # fmt: skip
        (copy / SIGNAL).touch(mode=0o600)
        self.installation.own(copy / SIGNAL)
        sync_directory(copy)
        self._forget_lineage()
        if self.path.exists():
            self.path.rename(old)
        copy.rename(self.path)
        sync_directory(self.volume)
        await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)
        log.info("copied")

    async def _run(self, program: str, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *self.installation.command(program, *arguments),
            cwd="/",
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        text = b""
        try:
            async with asyncio.TaskGroup() as group:
                interruption = group.create_task(_end_when(self.interrupted, process))
                text, _ = await process.communicate()
                interruption.cancel()
        finally:
            if process.returncode is None:
                process.kill()
        output = text.decode(errors="replace").strip()
        if process.returncode != 0:
            raise DatabaseError(f"{program} failed with status {process.returncode}: {output[-REPORT_BYTES:]}")
        return output


async def _end_when(event: asyncio.Event, process: asyncio.subprocess.Process) -> None:
    await event.wait()
    if process.returncode is None:
        process.terminate()
