"""A running HAProxy, and the two ways of changing it: told at run time, or reloaded onto new files.

The process itself belongs to `launcher`, so that traffic survives this daemon. Both share a directory of files (`live`,
what HAProxy was started with and is kept true to what it runs) and one of sockets. A change is written to the files
first, with a `dirty` mark that lasts until HAProxy has taken it: a daemon that starts over the mark reloads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flynn.router.paths import CONFIG, Paths
from flynn.router.plan import Change, Reload, RetireServer, ServerRef, accepted, commands, plan
from flynn.router.render import BASE, RUN, Rendered
from flynn.router.stats import ServerStat, parse

log = logging.getLogger(__name__)

COMMAND_SECONDS = 5.0
VALIDATE_SECONDS = 20.0
RELOAD_SECONDS = 15.0
POLL_SECONDS = 0.05

_DIRTY = "dirty"


class Invalid(Exception):
    """HAProxy refuses the configuration; the text is its explanation. What ran before still runs."""


class ReloadFailed(Exception):
    """The configuration is valid, but no worker came up with it. What ran before still runs."""


class Haproxy:
    def __init__(self, paths: Paths, binary: str = "haproxy") -> None:
        self.paths = paths
        self._binary = binary
        self._running: Rendered | None = None  # None: not known
        self._retiring: set[ServerRef] = set()
        self.reloads = 0
        paths.create()

    async def apply(self, new: Rendered) -> None:
        """Make HAProxy run `new`.

        Raises:
            Invalid: HAProxy does not accept it.
            ReloadFailed: it could not start on it, for example because an address is taken.
        """
        old = self._running
        if old is None:
            if not await self._is_running_already(new):
                await self._reload(new, "not known what is running")
                return
            log.info("adopted the running HAProxy", extra={"generation": new.generation})
            self._running = new
            return
        changes = plan(old, new, self._retiring)
        if changes and isinstance(changes[0], Reload):
            await self._reload(new, changes[0].reason)
        elif changes:
            await self._change(new, changes)

    async def _change(self, new: Rendered, changes: Sequence[Change]) -> None:
        self._running = None  # until all of it is done: what is half done is repaired by a reload
        self._write(self.paths.live, self._files(new, self.paths.live), mark=True)
        for change in changes:
            for command in commands(change):
                answer = await self.tell(self._placed(command))
                if not accepted(answer):
                    await self._reload(new, f"{command.partition(' <<')[0]}: {answer.strip()}")
                    return
            if isinstance(change, RetireServer):
                await self._tell_old_workers(commands(change)[0])
        self._running = new
        self._retiring |= {(c.backend, c.name) for c in changes if isinstance(c, RetireServer)}
        self._retiring = {ref for ref in self._retiring if ref[1] not in new.servers.get(ref[0], {})}
        self._tidy(new)
        log.info("changed HAProxy", extra={"changes": len(changes)})

    async def validate(self, new: Rendered) -> None:
        """Raises Invalid."""
        shutil.rmtree(self.paths.candidate, ignore_errors=True)
        self._write(self.paths.candidate, self._files(new, self.paths.candidate))
        process = await asyncio.create_subprocess_exec(
            self._binary,
            "-c",
            "-q",
            "-f",
            str(self.paths.candidate / CONFIG),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(VALIDATE_SECONDS):
                _, text = await process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            raise
        if process.returncode:
            alerts = [line for line in text.decode(errors="replace").splitlines() if "ALERT" in line]
            raise Invalid("; ".join(alerts) or f"exit code {process.returncode}")

    async def _reload(self, new: Rendered, reason: str) -> None:
        await self.validate(new)
        before = {path.name: path.read_bytes() for path in self.paths.live.iterdir() if path.is_file()}
        self._running = None
        self._write(self.paths.live, self._files(new, self.paths.live), mark=True)
        worker = await self._worker()
        if worker is not None:
            with suppress(OSError, TimeoutError):
                await self._ask(self.paths.master, "reload")
        # Without a worker, the launcher starts one as soon as it sees the files.
        if not await self._generation_comes_up(new.generation, other_than=worker):
            self._write(self.paths.live, {name: content for name, content in before.items() if name != _DIRTY})
            raise ReloadFailed(f"no worker runs generation {new.generation} after {RELOAD_SECONDS:g} s")
        self.reloads += 1
        self._running = new
        self._retiring.clear()
        self._tidy(new)
        log.info("HAProxy runs a new configuration", extra={"generation": new.generation, "reason": reason})

    async def _generation_comes_up(self, generation: str, *, other_than: str | None) -> bool:
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                while True:
                    info = await self.info()
                    if info.get("description") == generation and info.get("Pid") != other_than:
                        return True
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False

    async def _worker(self) -> str | None:
        return (await self.info()).get("Pid")

    async def _is_running_already(self, new: Rendered) -> bool:
        """After a restart of this daemon: nothing to do if the files are what we would write, and no mark is left."""
        wanted = self._files(new, self.paths.live)
        present = {path.name: path.read_bytes() for path in self.paths.live.iterdir() if path.is_file()}
        return present == wanted and (await self.info()).get("description") == new.generation

    # Talking to it

    async def info(self) -> dict[str, str]:
        """What the current worker says about itself; empty if there is none."""
        try:
            answer = await self.tell("show info")
        except (OSError, TimeoutError):
            return {}
        return {key: value.strip() for key, _, value in (line.partition(":") for line in answer.splitlines())}

    async def tell(self, command: str) -> str:
        return await self._ask(self.paths.admin, command)

    async def stats(self) -> dict[ServerRef, ServerStat]:
        """All servers of the current worker, with what replaced workers still have in flight on them."""
        found = parse(await self.tell("show stat -1 4 -1"))
        for worker in await self._old_workers():
            with suppress(OSError, TimeoutError):
                for ref, old in parse(await self._ask(self.paths.master, f"@!{worker} show stat -1 4 -1")).items():
                    known = found.get(ref, ServerStat(maintenance=True))
                    found[ref] = replace(known, in_flight=known.in_flight + old.in_flight)
        return found

    async def reap(self) -> None:
        """Delete servers that have left and are idle; those with requests in flight wait for the next call."""
        running = self._running
        if running is None:
            return
        for (backend, name), stat in (await self.stats()).items():
            if backend not in running.servers or name in running.servers[backend] or name == "identity":
                continue
            if not stat.maintenance:
                await self.tell(f"set server {backend}/{name} state maint")
            elif stat.in_flight == 0 and accepted(await self.tell(f"del server {backend}/{name}")):
                self._retiring.discard((backend, name))

    @property
    def retiring(self) -> frozenset[ServerRef]:
        return frozenset(self._retiring)

    async def _old_workers(self) -> list[str]:
        try:
            answer = await self._ask(self.paths.master, "show proc")
        except (OSError, TimeoutError):
            return []
        _, _, old = answer.partition("# old workers")
        lines = [line.split() for line in old.partition("# programs")[0].splitlines()]
        return [words[0] for words in lines if len(words) > 1 and words[1] == "worker"]

    async def _tell_old_workers(self, command: str) -> None:
        for worker in await self._old_workers():
            with suppress(OSError, TimeoutError):
                await self._ask(self.paths.master, f"@!{worker} {command}")

    async def _ask(self, socket: Path, command: str) -> str:
        async with asyncio.timeout(COMMAND_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(command.encode() + b"\n")
                writer.write_eof()  # the master answers until we are done, not once
                return (await reader.read(-1)).decode(errors="replace")
            finally:
                writer.close()

    # Files

    def _placed(self, command: str) -> str:
        return command.replace(BASE, str(self.paths.live)).replace(RUN, str(self.paths.run))

    def _files(self, new: Rendered, directory: Path) -> dict[str, bytes]:
        return new.files(str(directory), str(self.paths.run))

    def _write(self, directory: Path, files: Mapping[str, bytes], *, mark: bool = False) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if mark:
            (directory / _DIRTY).touch()
        # The configuration last: it is what the launcher waits for, and it names the others.
        for name, content in sorted(files.items(), key=lambda item: item[0] == CONFIG):
            path = directory / name
            if path.exists() and path.read_bytes() == content:
                continue
            beside = directory / f".{name}.new"
            beside.touch(mode=0o600)
            beside.write_bytes(content)
            os.replace(beside, path)

    def _tidy(self, new: Rendered) -> None:
        """Forget files of the past, and the mark."""
        wanted = self._files(new, self.paths.live)
        for path in self.paths.live.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)
