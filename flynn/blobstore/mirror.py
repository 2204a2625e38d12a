"""Several instances, one store: every write goes to all of them, and a new one begins with what the others have.

A volume belongs to one release of the blobstore on one host, so without this a new release, or an instance on another
node, would begin empty. The rules:

- Members find each other under a service of their own (`blobstore-mirror`), before they serve anybody.
- A write is committed locally, then sent to every other member, then answered. A member that cannot be reached gets it
  later; until then nobody waits for it again.
- A new member first makes sure that every other one sends it new writes, then fetches what it lacks, and only then
  registers as `blobstore`. So when its predecessor stops, nothing is missing.
- Who sees a member come (back) compares with it once both have caught up, and makes good on both sides what a cut link
  or an expired registration has made one of them miss.
- Of two versions of a blob the one written later wins.

Conditional writes (leases, repositories) need one place that decides: their writers use the leader of the service.
Deletions are not remembered: what an instance that was cut off has kept comes back, which is only garbage.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Protocol
from urllib.parse import quote

from flynn.aio.backoff import Backoff, attempts
from flynn.aio.supervisor import TaskSet
from flynn.blobstore.backend import Backend, Blob, Guard
from flynn.blobstore.conditions import Span
from flynn.discoverd.registry import Registry
from flynn.http.client import HttpClient
from flynn.types.codec import Wire
from flynn.types.errors import ApiError, NotFound, PreconditionFailed, Unreachable
from flynn.types.instance import EventKind, Instance

log = logging.getLogger(__name__)

SERVICE = "blobstore-mirror"
MIRRORED = "Blobstore-Mirrored"  # header of a write that came from a member: when it was first made
RECORDS_PATH = "/.mirror/records"
MEMBERS_PATH = "/.mirror/members"
CAUGHT_UP_PATH = "/.mirror/caught-up"

RETRY = Backoff(first=timedelta(milliseconds=500), limit=timedelta(seconds=10))
POLL = timedelta(milliseconds=200)
PATIENCE = timedelta(seconds=2)  # with a member that is listed but does not answer: killed, mostly
SEND_SECONDS = 600.0


class Record(Wire):
    """What a member says of a blob it has."""

    name: str
    sha512: str
    modified: datetime
    content_type: str = ""

    @classmethod
    def of(cls, blob: Blob) -> Record:
        return cls(name=blob.name, sha512=blob.sha512, modified=blob.modified, content_type=blob.content_type)


class Outdated(Exception):
    """What was sent is older than what is there."""


def newer_only(modified: datetime) -> Guard:
    """Return the guard of a mirrored write."""

    def guard(old: Blob | None) -> None:
        if old is not None and old.modified >= modified:
            raise Outdated

    return guard


class Forwarding(Protocol):
    """Whoever wants to hear of writes before they are answered."""

    async def put(self, name: str) -> None: ...

    async def delete(self, name: str) -> None: ...


class Alone:
    """A store without other members."""

    async def put(self, name: str) -> None:
        return

    async def delete(self, name: str) -> None:
        return


class _Member:
    """Another instance, and what it has not got yet."""

    def __init__(self, instance: Instance, http: HttpClient, backend: Backend, caught_up: asyncio.Event) -> None:
        """`caught_up` is set when we have what the others had when we started."""
        self.instance = instance
        self.http = http
        self._backend = backend
        self._caught_up = caught_up
        self._pending: dict[str, None] = {}  # names, in order; what has become of them is looked up when sending
        self._wake = asyncio.Event()

    async def send(self, name: str) -> None:
        """Send now, or later if the member is behind already or does not answer."""
        if not self._pending:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._send(name)
                return
            except (ApiError, TimeoutError) as error:
                log.warning("a member misses a write", extra={"member": self.instance.addr, "error": error})
        self._pending[name] = None
        self._wake.set()

    async def keep_up(self) -> None:
        """Compare, then send what is pending, for as long as the member exists."""
        await self._caught_up.wait()
        async for _ in attempts(RETRY):
            try:
                if await self.http.get(CAUGHT_UP_PATH, answer=bool):
                    await self._compare()
                    break
            except (ApiError, TimeoutError) as error:
                log.info("cannot compare yet", extra={"member": self.instance.addr, "error": error})
        while True:
            await self._wake.wait()
            async for _ in attempts(RETRY):
                try:
                    while self._pending:
                        name = next(iter(self._pending))
                        await self._send(name)
                        del self._pending[name]
                    break
                except ApiError:
                    continue
            self._wake.clear()
            log.info("a member has caught up", extra={"member": self.instance.addr})

    async def _compare(self) -> None:
        """Fetch what only the member has, and have it sent what only we have."""
        theirs = {record.name: record for record in await self.http.get(RECORDS_PATH, answer=list[Record])}
        mine = {blob.name: blob for blob in await self._backend.records()}
        wanted = [record for record in theirs.values() if _is_news(record, mine.get(record.name))]
        missed = [blob.name for blob in mine.values() if _is_news(Record.of(blob), theirs.get(blob.name))]
        for record in wanted:
            await _fetch(self.http, record, self._backend)
        if missed:
            self._pending.update(dict.fromkeys(missed))
            self._wake.set()
        if wanted or missed:
            log.info("compared", extra={"member": self.instance.addr, "fetched": len(wanted), "missed": len(missed)})

    async def _send(self, name: str) -> None:
        """Make the member have what we have under `name`."""
        try:
            async with self._backend.open(name) as opened:
                blob = opened.blob
                headers = {"Content-Type": blob.content_type, MIRRORED: blob.modified.isoformat()}
                body = opened.read(Span(0, blob.size - 1)) if blob.size else b""
                await self.http.upload(quote(name, errors="surrogateescape"), body, headers=headers)
        except NotFound:
            await self.http.call("DELETE", quote(name, errors="surrogateescape"), headers={MIRRORED: "now"})


class Mirror:
    """The other members, as one of them sees them."""

    def __init__(
        self, own: Instance, backend: Backend, connect: Callable[[Instance], HttpClient], tasks: TaskSet
    ) -> None:
        """`connect` makes the client of one instance."""
        self._own = own
        self._backend = backend
        self._connect = connect
        self._tasks = tasks
        self._members: dict[str, _Member] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._caught_up = asyncio.Event()

    def members(self) -> list[str]:
        """Return the ids of those whom we send our writes to."""
        return sorted(self._members)

    def caught_up(self) -> bool:
        """Tell whether we have what the others had when we started."""
        return self._caught_up.is_set()

    async def records(self) -> list[Record]:
        """Return what we have."""
        return [Record.of(blob) for blob in await self._backend.records()]

    async def put(self, name: str) -> None:
        """Tell all members of a write. Returns when they have it or are known to be behind."""
        if self._members:
            await asyncio.gather(*(member.send(name) for member in list(self._members.values())))

    async def delete(self, name: str) -> None:
        """Tell all members of a deletion."""
        await self.put(name)

    async def follow(self, registry: Registry) -> None:
        """Keep the list of members, for ever."""
        async with aclosing(registry.watch(SERVICE)) as events:
            async for event in events:
                if event.instance is None or event.instance.id == self._own.id:
                    continue
                if event.kind in (EventKind.UP, EventKind.UPDATE):
                    self._join(event.instance)
                elif event.kind is EventKind.DOWN:
                    self._leave(event.instance.id)

    def _join(self, instance: Instance) -> None:
        if instance.id in self._members:
            return
        member = _Member(instance, self._connect(instance), self._backend, self._caught_up)
        self._members[instance.id] = member
        self._keepers[instance.id] = self._tasks.start(f"keep up {instance.addr}", member.keep_up())
        log.info("a member joined", extra={"member": instance.addr})

    def _leave(self, instance_id: str) -> None:
        member = self._members.pop(instance_id, None)
        if member is not None:
            self._keepers.pop(instance_id).cancel()
            self._tasks.start("close a connection", member.http.close())
            log.info("a member left", extra={"member": member.instance.addr})

    async def catch_up(self, registry: Registry) -> None:
        """Return when we have what every other member has.

        A member that is gone from the directory does not count. One that is listed but does not answer is waited for
        only by a store that has nothing yet: it may be the one that has everything. A store that has its data back
        goes on without; if the other one lives, it will send us what it has in store for us.
        """
        empty = not await self._backend.records()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE.total_seconds()
        done: set[str] = set()
        async for _ in attempts(Backoff(first=POLL, factor=1)):
            others = {i.id: i for i in await registry.instances(SERVICE) if i.id != self._own.id}
            for instance_id in others.keys() - done:
                try:
                    if await self._catch_up_with(others[instance_id]):
                        done.add(instance_id)
                except (ApiError, TimeoutError) as error:
                    log.info("cannot catch up yet", extra={"member": others[instance_id].addr, "error": error})
                    if not empty and loop.time() > deadline:
                        done.add(instance_id)
            if others.keys() <= done:
                self._caught_up.set()
                return

    async def _catch_up_with(self, instance: Instance) -> bool:
        """Fetch what we lack; False while the other one does not send us its writes yet."""
        async with self._connect(instance) as http:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                members = await http.get(MEMBERS_PATH, answer=list[str])
            if self._own.id not in members:
                return False
            records = await http.get(RECORDS_PATH, answer=list[Record])
            mine = {blob.name: blob for blob in await self._backend.records()}
            wanted = [record for record in records if _is_news(record, mine.get(record.name))]
            for record in wanted:
                await _fetch(http, record, self._backend)
        log.info("caught up", extra={"member": instance.addr, "blobs": len(records), "fetched": len(wanted)})
        return True


async def _fetch(http: HttpClient, record: Record, into: Backend) -> None:
    try:
        async with http.download(quote(record.name, errors="surrogateescape")) as (headers, chunks):
            await into.put(
                record.name,
                _all_of(chunks, int(headers.get("Content-Length", "0"))),
                content_type=record.content_type,
                modified=record.modified,
                guard=newer_only(record.modified),
            )
    except (NotFound, PreconditionFailed, Outdated):
        pass  # changed since the list was made: then the change was sent to us as well


def _is_news(record: Record, mine: Blob | Record | None) -> bool:
    return mine is None or (mine.sha512 != record.sha512 and mine.modified < record.modified)


async def _all_of(chunks: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        yield chunk
    if received != length:
        raise Unreachable(f"{received} of {length} bytes arrived")
