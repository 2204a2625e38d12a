"""Clients of a directory that write, read, register and watch, and write down what they were told.

python -m tests.discoverd.workload <identity directory> <file> <seconds> <seed> <address>...

A process of its own, since it has to run where the members can be reached: inside a network namespace. One line of JSON
per observation; times are CLOCK_MONOTONIC, which all processes of a machine share. `test_faults` does the judging.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any, TextIO

from flynn.aio.supervisor import supervisor
from flynn.discoverd.client import Discoverd
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError, NotFound, ObjectExists, PreconditionFailed
from flynn.types.instance import DiscoverdEvent, Instance, ServiceMeta

DOCUMENTS = ("doc-0", "doc-1", "doc-2")
TEAM = "team"
WRITERS, STEADY, FICKLE = 5, 4, 2
TRY_SECONDS = 3.0
FINAL_SECONDS = 60.0  # to find everybody of one opinion when all faults are mended


class Workload:
    def __init__(self, identity: Identity, addresses: Sequence[str], file: TextIO, seed: int) -> None:
        self.identity = identity
        self.addresses = addresses
        self.file = file
        self.random = Random(seed)
        self.over = False
        self.streams = 0
        self.heard: dict[tuple[str, str], int] = {}  # per document and member, the newest index its watcher was told

    def note(self, kind: str, **what: Any) -> None:
        self.file.write(json.dumps({"kind": kind, **what}) + "\n")

    def http(self, address: str) -> HttpClient:
        # A connection for each try: on a kept one the HTTP library repeats a request that it deems harmless.
        return HttpClient(f"https://{address}:1111", tls=self.identity, timeout=TRY_SECONDS)

    def directory(self) -> Discoverd:
        nearest = self.random.sample(self.addresses, len(self.addresses))
        return Discoverd.connect([f"{address}:1111" for address in nearest], identity=self.identity)

    async def run(self, seconds: float) -> None:
        async with self.directory() as directory:
            for service in (*DOCUMENTS, TEAM):
                await directory.create(service)
        self.note("ready", at=time.monotonic())
        self.file.flush()
        async with supervisor() as spawn:
            for number in range(WRITERS):
                spawn(f"writer {number}", self.write(f"w{number}"))
            for number in range(STEADY + FICKLE):
                spawn(f"registrant {number}", self.register(number, steady=number < STEADY))
            for address in self.addresses:
                for service in (*DOCUMENTS, TEAM):
                    spawn(f"watch {service} at {address}", self.watch(service, address))
            spawn("watch", self.follow())
            spawn("watch leader", self.follow_leader())
            await asyncio.sleep(seconds)
            self.over = True
            await self.agree()
            self.note("end", at=time.monotonic())

    async def write(self, client: str) -> None:
        known = dict.fromkeys(DOCUMENTS, 0)
        number = 0
        while True:
            await asyncio.sleep(self.random.expovariate(25))
            if self.over:
                await asyncio.Event().wait()
            document, at = self.random.choice(DOCUMENTS), self.random.choice(self.addresses)
            if self.random.random() < 0.3:
                known[document] = await self.read(client, document, at) or known[document]
                continue
            number += 1
            value = f"{client}-{number}"
            index = await self.replace(document, at, known[document], value)
            if index is None:
                known[document] = await self.read(client, document, at) or known[document]
            elif index > 0:
                known[document] = index

    async def replace(self, document: str, at: str, expected: int, value: str) -> int | None:
        """The new index, None if refused, 0 if nobody knows."""
        invoked = time.monotonic()
        index: int | None = 0
        async with self.http(at) as http:
            try:
                meta = ServiceMeta(data=value, index=expected)
                index = (await http.put(f"/services/{document}/meta", meta, answer=ServiceMeta)).index
            except (PreconditionFailed, ObjectExists):
                index = None
            except ApiError:
                pass
        self.note(
            "write", document=document, expected=expected, value=value, invoked=invoked,
            returned=time.monotonic(), index=index,
        )  # fmt: skip
        return index

    async def read(self, client: str, document: str, at: str) -> int | None:
        invoked = time.monotonic()
        async with self.http(at) as http:
            try:
                meta = await http.get(f"/services/{document}/meta", answer=ServiceMeta)
            except ApiError:
                return None
        self.note(
            "read", document=document, member=at, client=client, index=meta.index, value=meta.data,
            invoked=invoked, returned=time.monotonic(),
        )  # fmt: skip
        return meta.index

    async def register(self, number: int, *, steady: bool) -> None:
        instance = Instance.at(f"10.1.0.{number}:80", "tcp")
        version = 0
        async with self.directory() as directory:
            while True:
                invoked = time.monotonic()
                try:
                    await directory.register(TEAM, instance)
                    self.note(
                        "heartbeat", id=instance.id, steady=steady, invoked=invoked, returned=time.monotonic()
                    )  # fmt: skip
                except ApiError:
                    continue
                await asyncio.sleep(self.random.uniform(0.5, 2.0))
                if self.over:
                    continue
                if self.random.random() < 0.15:
                    version += 1
                    instance = Instance.at(instance.addr, "tcp", {"version": f"{number}.{version}"})
                elif not steady and self.random.random() < 0.3:
                    try:
                        await directory.deregister(TEAM, instance.id)
                    except ApiError:
                        continue

    async def watch(self, service: str, address: str) -> None:
        """Raw streams of one member, connection after connection."""
        while True:
            self.streams += 1
            stream = self.streams
            try:
                async with HttpClient(f"https://{address}:1111", tls=self.identity) as http:
                    async with http.subscribed(f"/services/{service}", DiscoverdEvent, silence=35) as events:
                        self.note("connected", stream=stream, service=service, member=address, at=time.monotonic())
                        async for event in events:
                            self.told("event", event, stream=stream)
                            if event.service_meta is not None:
                                self.heard[service, address] = event.service_meta.index
            except ApiError:
                await asyncio.sleep(0.2)

    async def follow(self) -> None:
        """What a user of the client library is told, who never hears of connections."""
        async with self.directory() as directory, aclosing(directory.watch(TEAM)) as events:
            async for event in events:
                self.told("followed", event)

    async def follow_leader(self) -> None:
        async with self.directory() as directory, aclosing(directory.watch_leader(TEAM)) as leaders:
            async for leader in leaders:
                self.note("leader", id=leader.id if leader else "", at=time.monotonic())

    def told(self, kind: str, event: DiscoverdEvent, **more: Any) -> None:
        one, meta = event.instance, event.service_meta
        index = one.index if one else meta.index if meta else 0
        version = one.meta.get("version", "") if one else str(meta.data) if meta else ""
        what = {"event": str(event.kind), "id": one.id if one else "", "index": index, "version": version}
        self.note(kind, **what, at=time.monotonic(), **more)

    async def agree(self) -> None:
        """Everybody of one opinion, and a last write on top of each document."""
        async with asyncio.timeout(FINAL_SECONDS):
            for document in DOCUMENTS:
                while not await self._append(document):
                    await asyncio.sleep(0.2)
            while True:
                opinions = [opinion async for opinion in self._opinions()]
                if len(opinions) == len(self.addresses) and all(self._told_of(opinions[0], one) for one in opinions):
                    break
                await asyncio.sleep(0.2)
        self.note("agreed", opinion=opinions[0])
        await asyncio.sleep(1)  # for what is still on its way to the watchers

    def _told_of(self, opinion: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether two members say the same, and the watchers of all members have been told just that."""
        heard = (self.heard.get((name, at)) == opinion[name] for name in DOCUMENTS for at in self.addresses)
        return opinion == other and all(heard)

    async def _append(self, document: str) -> bool:
        at = self.random.choice(self.addresses)
        async with self.http(at) as http:
            try:
                index = (await http.get(f"/services/{document}/meta", answer=ServiceMeta)).index
            except NotFound:
                index = 0
            except ApiError:
                return False
        self.streams += 1
        return bool(await self.replace(document, at, index, f"last-{self.streams}"))

    async def _opinions(self) -> AsyncIterator[dict[str, Any]]:
        for address in self.addresses:
            async with self.http(address) as http:
                try:
                    opinion: dict[str, Any] = {
                        document: (await http.get(f"/services/{document}/meta", answer=ServiceMeta)).index
                        for document in DOCUMENTS
                    }
                    team = await http.get(f"/services/{TEAM}/instances", answer=list[Instance])
                    opinion[TEAM] = {one.id: one.index for one in team}
                    opinion["leader"] = (await http.get(f"/services/{TEAM}/leader", answer=Instance)).id
                    yield opinion
                except ApiError:
                    return


async def main(directory: str, path: str, seconds: str, seed: str, *addresses: str) -> None:
    with Path(path).open("w") as file:
        await Workload(Identity.load(directory), addresses, file, int(seed)).run(float(seconds))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
