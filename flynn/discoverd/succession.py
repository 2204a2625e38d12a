"""Who of several discoverd processes on one node is the one: the holder of the lock in the data directory.

A process that finds the lock taken stands by. If a deployment (`types/rollout`) says that its release comes next, it
waits until no other node is being replaced and all other members are well, and then asks the holder to make way. The
holder ends its watches, hands its lead over, closes log and doors, gives up the lock, and goes on answering names from
what it knew until its successor does; then it stands by itself. So whatever becomes of the successor, killed or taken
back by the deployment, the process before it is there to go on.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from flynn.aio.backoff import Backoff, attempts
from flynn.discoverd.client import Discoverd
from flynn.discoverd.config import Config
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.codec import Wire, builtins, convert
from flynn.types.errors import ApiError, NotFound, PreconditionFailed
from flynn.types.instance import ServiceMeta
from flynn.types.rollout import Rollout, RolloutState
from flynn.types.status import StatusDocument

log = logging.getLogger(__name__)

SERVICE = "discoverd"
LOOK_EVERY = 0.2  # seconds between looks while standing by
LOOK_LIMIT = 3.0  # for one look at holder and deployment
LOCK_EVERY = 0.03
CALL_SECONDS = 3.0
MAKE_WAY_SECONDS = 15.0  # for the holder's answer: it hands its lead over first
HEAD_START_SECONDS = 2.0  # which the successor has to take the lock before it counts as dead
SUCCESSOR_SECONDS = 12.0  # after which the names go unanswered, or the process before goes on
MARK = Backoff(first=timedelta(milliseconds=100), factor=1.5)


class Detail(Wire):
    """What one discoverd says about itself in its status, as far as a successor has to know."""

    release: str = ""
    job: str = ""
    dns: str = ""


class DataDirectoryLock:
    """The right to use a data directory; the kernel gives it back when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def taken(self) -> bool:
        """Take it if it is free; whether it is ours now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def __enter__(self) -> DataDirectoryLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Succession:
    """This process, among those of its node that may come before or after it."""

    config: Config
    identity: Identity
    release: str

    async def begin(self, lock: DataDirectoryLock) -> None:
        """Returns when the lock is ours: at once if it is free, else when the holder is gone or has made way."""
        said = False
        while not lock.taken():
            if not said:
                log.info("another process has the data directory, standing by", extra={"release": self.release})
                said = True
            try:
                async with asyncio.timeout(LOOK_LIMIT):
                    ours = await self._may_ask()
                if ours:
                    await self._take_from_holder(lock)
            except (ApiError, TimeoutError) as error:
                log.debug("the holder does not answer", extra={"error": repr(error)})
            await asyncio.sleep(LOOK_EVERY)

    async def _take_from_holder(self, lock: DataDirectoryLock) -> None:
        """Ask the holder, and then look at nothing but the lock: it is given up in a moment, and not for long."""
        try:
            await self._ask_to_make_way()
        finally:
            async with asyncio.timeout(SUCCESSOR_SECONDS):
                while not lock.taken():
                    await asyncio.sleep(LOCK_EVERY)

    async def done(self) -> None:
        """Tell the deployment, if there is one for this release, that this node has it. Tries until that is written."""
        async with self._registry() as registry:
            async for _ in attempts(MARK):
                try:
                    meta, rollout = await _rollout(registry)
                    if rollout is None or rollout.release != self.release or not self.release:
                        return
                    if rollout.states.get(self.config.address) != RolloutState.DONE:
                        await _write(registry, meta, rollout.done_by(self.config.address))
                        log.info("this node has the new release", extra={"deployment": rollout.id})
                except NotFound:
                    return
                except ApiError as error:
                    log.debug("cannot tell the deployment yet", extra={"error": error})
                else:
                    return

    async def followed(self, lock: DataDirectoryLock, job: str, dns: str) -> bool:
        """Give the lock up and wait until another process answers in our place, names included.

        False if it is not there in time, or if it died on the way and the lock is ours again.
        """
        lock.release()
        loop = asyncio.get_running_loop()
        given_up = loop.time()
        while (waited := loop.time() - given_up) < SUCCESSOR_SECONDS:
            try:
                successor = await self._detail(self.config.address)
                if successor.job != job and (successor.dns or not dns):
                    return True
            except ApiError:
                if waited > HEAD_START_SECONDS and lock.taken():
                    return False
            await asyncio.sleep(LOOK_EVERY / 2)
        return False

    async def _may_ask(self) -> bool:
        """Whether it is our turn; then it is marked as such, so that nobody else's is it."""
        holder = await self._detail(self.config.address)
        async with self._registry() as registry:
            meta, rollout = await _rollout(registry)
            if rollout is None or not rollout.wants(self.release, instead_of=holder.release):
                return False
            ours = rollout.performed_by(self.config.address)
            if ours is None:
                return False
            if ours != rollout:
                try:
                    await _write(registry, meta, ours)
                except PreconditionFailed:
                    return False
                log.info("it is our turn", extra={"deployment": rollout.id, "holder": holder.release})
            return await self._others_are_well()

    async def _others_are_well(self) -> bool:
        """Whether all other members can keep the directory without this one."""
        async with self._http(self.config.address) as http:
            members = await http.get("/raft/peers", answer=list[str])
        for member in members:
            if member != self.config.address:
                await self._detail(member)  # an unhealthy one raises
        return True

    async def _ask_to_make_way(self) -> None:
        async with self._http(self.config.address, MAKE_WAY_SECONDS) as http:
            await http.post("/shutdown")
        log.info("the holder makes way")

    async def _detail(self, address: str) -> Detail:
        async with self._http(address) as http:
            status = (await http.get("/.well-known/status", answer=StatusDocument)).data
        return convert(status.detail, Detail)

    def _http(self, address: str, seconds: float = CALL_SECONDS) -> HttpClient:
        return HttpClient(f"https://{address}", tls=self.identity, timeout=seconds)

    @asynccontextmanager
    async def _registry(self) -> AsyncIterator[Discoverd]:
        async with Discoverd.connect(self.config.address, identity=self.identity) as registry:
            yield registry


async def _rollout(registry: Discoverd) -> tuple[ServiceMeta, Rollout | None]:
    """The deployment under way, or the last one; None if the metadata is of no deployment of ours."""
    meta = await registry.get_meta(SERVICE)
    if meta is None or not isinstance(meta.data, dict) or "id" not in meta.data:
        return ServiceMeta(), None
    return meta, convert(meta.data, Rollout)


async def _write(registry: Discoverd, meta: ServiceMeta, rollout: Rollout) -> None:
    await registry.put_meta(SERVICE, ServiceMeta(data=builtins(rollout), index=meta.index))
