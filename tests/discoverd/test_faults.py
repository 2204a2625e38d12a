"""Real members on machines of their own, real faults, and a judge: could one directory have said all that?

Members are killed, stopped, cut off and parted from each other while clients write, register and watch. FAULT_SECONDS
(40) says for how long, FAULT_MEMBERS (3) on how many, FAULT_SEED which faults; a failure names its seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flynn.identity.authority import ClusterCA
from tests.discoverd import history
from tests.discoverd.history import Down, Heartbeat, Outcome, Stream, Told, Write
from tests.discoverd.workload import DOCUMENTS, TEAM
from tests.flannel.machines import Machine, ip, machines, switch_address

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]

SECONDS = float(os.environ.get("FAULT_SECONDS", "40"))
MEMBERS = int(os.environ.get("FAULT_MEMBERS", "3"))
SEED = int(os.environ.get("FAULT_SEED", "0")) or random.randrange(1, 10**6)


class Member:
    """One discoverd on its machine."""

    def __init__(self, machine: Machine, peers: list[str]) -> None:
        self.machine = machine
        self._stack = AsyncExitStack()
        self._peers = ",".join(f"{peer}:1111" for peer in peers)
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        environ = {
            "FLYNN_IDENTITY": str(self.machine.directory / "discoverd"),
            "DISCOVERD_PEERS": self._peers,
            "RAFT_KEY": "secret of the test",
            "LOG_LEVEL": "error",
        }
        self.process = await self._stack.enter_async_context(
            self.machine.process(
                "flynn.discoverd.main",
                "-data-dir",
                str(self.machine.directory / "data"),
                "-notify",
                "",
                environ=environ,
            )
        )

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        await self._stack.aclose()


@dataclass
class Faults:
    members: list[Member]
    random: Random
    story: list[str] = field(default_factory=list)

    async def until(self, end: float) -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(self.random.uniform(1, 4))
            fault = self.random.choice([*2 * self.common, self.kill_several, self.restart])
            at = time.monotonic() - began
            self.story.append(f"{at:5.1f} {await fault()}")

    @property
    def common(self) -> list[Callable[[], Awaitable[str]]]:
        return [self.kill_one, self.stop_one, self.cut_one, self.part]

    def some(self) -> Member:
        return self.random.choice(self.members)

    async def pause(self, longest: float) -> float:
        seconds = self.random.uniform(0.3, longest)
        await asyncio.sleep(seconds)
        return seconds

    async def kill_one(self) -> str:
        one = self.some()
        await one.kill()
        seconds = await self.pause(3)
        await one.start()
        return f"{one.machine.address} killed, started after {seconds:.1f} s"

    async def kill_several(self) -> str:
        several = self.random.sample(self.members, self.random.randrange(2, len(self.members) + 1))
        for one in several:
            await one.kill()
        seconds = await self.pause(2)
        for one in several:
            await one.start()
        return f"{len(several)} killed, started after {seconds:.1f} s"

    async def restart(self) -> str:
        one = self.some()
        one.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            code = await one.process.wait()
        await one.start()
        return f"{one.machine.address} stopped in order ({code}) and started"

    async def stop_one(self) -> str:
        one = self.some()
        one.process.send_signal(signal.SIGSTOP)
        seconds = await self.pause(7)
        one.process.send_signal(signal.SIGCONT)
        return f"{one.machine.address} suspended for {seconds:.1f} s"

    async def cut_one(self) -> str:
        one = self.some()
        one.machine.cut()
        seconds = await self.pause(6)
        one.machine.mend()
        return f"{one.machine.address} cut off for {seconds:.1f} s"

    async def part(self) -> str:
        """Two that do not reach each other, or one that reaches the other without being reached."""
        one, other = self.random.sample(self.members, 2)
        ways = [(one, other), (other, one)][: self.random.choice([1, 2, 2])]
        for here, there in ways:
            ip("route", "add", "blackhole", f"{there.machine.address}/32", netns=here.machine.netns)
        seconds = await self.pause(6)
        for here, there in ways:
            ip("route", "del", "blackhole", f"{there.machine.address}/32", netns=here.machine.netns)
        ways_text = " | ".join(f"{here.machine.address} -> {there.machine.address}" for here, there in ways)
        return f"{ways_text} parted for {seconds:.1f} s"


async def test_whatever_breaks_the_directory_tells_one_story(tmp_path: Path) -> None:
    ca = ClusterCA.create()
    notes = tmp_path / "notes"
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(machines(MEMBERS, tmp_path, ca))
        members = [Member(machine, [one.address for one in made]) for machine in made]
        for member in members:
            await member.start()
            stack.push_async_callback(member.close)
        faults = Faults(members, Random(SEED))
        ca.issue_job("client", "app", "client", [switch_address()]).write(tmp_path / "client")
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", made[0].switch, sys.executable, "-m", "tests.discoverd.workload",
            str(tmp_path / "client"), str(notes), str(SECONDS + 3), str(SEED), *(machine.address for machine in made),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        stack.push_async_callback(_ended, process)
        async with asyncio.timeout(40):
            while not notes.exists() or not notes.stat().st_size:
                await asyncio.sleep(0.1)
        await faults.until(time.monotonic() + SECONDS)
        async with asyncio.timeout(100):
            code = await process.wait()
    report = f"\nFAULT_SEED={SEED}\n" + "\n".join(faults.story)
    print(report)
    assert code == 0, f"the clients did not find everybody of one opinion{report}"
    seen = Seen([json.loads(line) for line in notes.read_text().splitlines()])
    print(seen.summary)
    assert seen.faults() == [], report
    assert min(seen.acknowledged.values()) > 5, f"hardly anything was written{report}"


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


class Seen:
    """The notes of the clients, put before the judges."""

    def __init__(self, notes: list[dict[str, Any]]) -> None:
        self.of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for note in notes:
            self.of[note["kind"]].append(note)
        self.streams: dict[str, list[Stream]] = defaultdict(list)
        self.downs: dict[tuple[str, int], float] = {}
        told: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for event in self.of["event"]:
            told[event["stream"]].append(event)
        for connection in self.of["connected"]:
            events = told[connection["stream"]]
            current = next((n for n, event in enumerate(events) if event["event"] == "current"), None)
            if current is None:
                continue  # broken off before it was complete
            began, live = _told(events[:current]), _told(events[current + 1 :])
            self.streams[connection["service"]].append(Stream(connection["member"], began, live))
            for event in events[current + 1 :]:
                if event["event"] == "down":
                    registration = (event["id"], event["index"])
                    self.downs[registration] = min(event["at"], self.downs.get(registration, event["at"]))
        self.acknowledged = {document: sum(bool(w["index"]) for w in self._writes(document)) for document in DOCUMENTS}

    @property
    def summary(self) -> str:
        return (
            f"{len(self.of['write'])} writes ({self.acknowledged} acknowledged, "
            f"{sum(w['index'] == 0 for w in self.of['write'])} without an answer), {len(self.of['read'])} reads, "
            f"{len(self.of['heartbeat'])} heartbeats, {sum(map(len, self.streams.values()))} streams with "
            f"{len(self.of['event'])} events, {len(self.downs)} departures"
        )

    def faults(self) -> list[str]:
        return [
            *(fault for document in DOCUMENTS for fault in self._documents(document)),
            *self._reads(),
            *self._told_streams(),
            *self._registrations(),
            *self._followers(),
        ]

    def _writes(self, document: str) -> list[dict[str, Any]]:
        return [note for note in self.of["write"] if note["document"] == document]

    def _values(self, document: str) -> dict[str, int]:
        """The indexes under which values were seen by readers and watchers."""
        seen = {note["value"]: note["index"] for note in self.of["read"] if note["document"] == document}
        for stream in self.streams[document]:
            seen |= {e.version: e.index for e in (*stream.began, *stream.live) if e.kind == "service_meta"}
        return seen

    def _documents(self, document: str) -> list[str]:
        values = self._values(document)
        writes = []
        for note in self._writes(document):
            answered = note["index"] != 0
            outcome = Outcome(note["index"]) if answered else None
            returned = note["returned"] if answered else history.FOREVER
            writes.append(Write(note["invoked"], returned, note["expected"], note["value"], outcome))
        written = {one.value: one for one in writes}
        faults = [f"{document}: {value} was seen, but never written" for value in values if value not in written]
        for value, index in values.items():
            outcome = written[value].outcome if value in written else None
            if outcome is not None and outcome.index != index:
                faults.append(f"{document}: {value} was answered with {outcome.index}, but seen at {index}")
        if not history.linearizable(history.with_indexes(writes, values)):
            faults.append(f"{document}: no order of the writes explains the answers")
        return faults

    def _reads(self) -> list[str]:
        """A member does not go back, as long as a client asks it one question after the other."""
        faults = []
        newest: dict[tuple[str, str], tuple[float, int]] = {}
        for note in sorted(self.of["read"], key=lambda note: note["invoked"]):
            key = (note["document"], note["member"])
            returned, index = newest.get(key, (0.0, 0))
            if note["index"] < index and returned < note["invoked"]:
                faults.append(f"{note['member']} went back from {index} to {note['index']} of {note['document']}")
            if note["index"] >= index:
                newest[key] = (note["returned"], note["index"])
        return faults

    def _told_streams(self) -> list[str]:
        faults = []
        for service, streams in self.streams.items():
            for stream in streams:
                faults += [f"{service} at {stream.member}: {fault}" for fault in history.stream_faults(stream)]
            faults += [f"{service}: {fault}" for fault in history.disagreements(streams)]
        return faults

    def _registrations(self) -> list[str]:
        steady = [note for note in self.of["heartbeat"] if note["steady"]]
        beats = [Heartbeat(note["id"], note["invoked"], note["returned"]) for note in steady]
        return history.lost(beats, [Down(at, id) for (id, _), at in self.downs.items()])

    def _followers(self) -> list[str]:
        """The client library hides connections: its events add up, by themselves, to what everybody agrees on."""
        opinion = self.of["agreed"][-1]["opinion"]
        up: dict[str, int] = {}
        faults = []
        for event in self.of["followed"]:
            id, index = event["id"], event["index"]
            match event["event"]:
                case "up" if id in up:
                    faults.append(f"the library says that {id} came, who was there")
                case "up" | "update":
                    up[id] = index
                case "down" if up.pop(id, None) is None:
                    faults.append(f"the library says that {id} went, who was not there")
        for event in reversed(self.of["leader"]):
            if event["id"] != opinion["leader"]:
                faults.append(f"the library was last told that {event['id']} leads, not {opinion['leader']}")
            break
        if up != opinion[TEAM]:
            faults.append(f"the library's story ends with {up}, not {opinion[TEAM]}")
        return faults


def _told(events: list[dict[str, Any]]) -> list[Told]:
    return [Told(event["event"], event["id"], event["index"], event["version"]) for event in events]
