"""The platform's own database on three nodes: a new release of it, and its primary on a node that is cut off."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import network, node
from tests.cluster.lab.layout import Node
from tests.cluster.lab.trio import Lab, TrioUser
from tests.cluster.lab.user import eventually

pytestmark = pytest.mark.cluster3

WRITER = """
import asyncio, itertools, json, sys, time, urllib.request, psycopg
key, user, password, database, fixed = sys.argv[1:6]

def leader():
    if fixed != "-":
        return fixed
    request = urllib.request.Request("http://127.0.0.1:1111/services/postgres/leader")
    import base64
    request.add_header("Authorization", "Basic " + base64.b64encode((":" + key).encode()).decode())
    return json.load(urllib.request.urlopen(request, timeout=2))["addr"].split(":")[0]

async def main():
    numbers = itertools.count(int(sys.argv[6]))
    while True:
        try:
            address = await asyncio.to_thread(leader)
            async with await psycopg.AsyncConnection.connect(
                host=address, user=user, password=password, dbname=database, autocommit=True, connect_timeout=2
            ) as connection:
                await connection.execute("CREATE TABLE IF NOT EXISTS written (n bigint PRIMARY KEY)")
                while True:
                    number = next(numbers)
                    async with asyncio.timeout(4):
                        await connection.execute("INSERT INTO written VALUES (%s)", [number])
                    print(number, time.time(), flush=True)
                    await asyncio.sleep(0.01)
        except Exception as error:
            print("#", type(error).__name__, error, flush=True)
            await asyncio.sleep(0.05)

asyncio.run(main())
"""


class Writer:
    """A client of an app's database on one node, and what it was told to be safe."""

    def __init__(self, member: Node, url: str, first: int = 0, at: str = "-") -> None:
        found = re.fullmatch(r"postgres://(\w+):(\w+)@[^/]+/(\w+)", url)
        assert found is not None, url
        key = (member.config / "host.key").read_text().strip()
        self._directory = tempfile.TemporaryDirectory(prefix="flynn-writer-")
        self._output = Path(self._directory.name) / "told"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                node.inside(member, [sys.executable, "-c", WRITER, key, *found.groups(), at, str(first)]),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def told(self) -> dict[int, float]:
        """Number -> when it was acknowledged."""
        text = self._output.read_text()
        lines = [line.split() for line in text.splitlines() if re.match(r"\d+ [\d.]+$", line)]
        return {int(number): float(at) for number, at in lines}

    def gap(self) -> float:
        return max(b - a for a, b in itertools.pairwise(sorted(self.told().values())))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def url(three: Lab, user: TrioUser, app: str) -> str:
    """The database of the app."""
    user.flynn("-a", app, "resource", "add", "postgres", timeout=180)
    return user.flynn("-a", app, "env", "get", "DATABASE_URL").strip()


def peers(three: Lab, seen_from: Node | None = None) -> dict[str, dict[str, object]]:
    """What each peer says, by its role; several asyncs count as one."""
    listed = json.loads(three.on(seen_from or three.nodes[0], "flynn-host", "database", "status", "--json"))
    return {peer["status"]["peer"]["role"]: peer for peer in listed if peer["status"] is not None}


def whole(three: Lab, seen_from: Node | None = None) -> bool:
    found = peers(three, seen_from)
    assert set(found) == {"primary", "sync", "async"}, found.keys()
    database = found["primary"]["status"]["database"]  # type: ignore[index]
    assert database["read_write"]
    assert database["synced_downstream"]["id"] == found["sync"]["instance"]["id"]  # type: ignore[index]
    return True


def address_of_primary(three: Lab, seen_from: Node | None = None) -> str:
    """Empty while nobody says that it is the primary."""
    found = peers(three, seen_from).get("primary")
    return str(found["instance"]["addr"]).partition(":")[0] if found else ""  # type: ignore[index]


def home(three: Lab, peer: dict[str, object]) -> Node:
    """The node of a peer."""
    job = peer["instance"]["meta"]["FLYNN_JOB_ID"]  # type: ignore[index]
    return next(member for member in three.nodes if str(job).startswith(f"{member.id}-"))


def stored(user: TrioUser, app: str) -> set[int]:
    done = user.run("flynn", "-a", app, "pg", "psql", "--", "-At", "-c", "SELECT n FROM written", timeout=60)
    assert done.returncode == 0, done.stderr
    return {int(line) for line in done.stdout.split()}


@pytest.fixture
def writer(three: Lab, url: str) -> Iterator[Writer]:
    writer = Writer(three.nodes[1], url, first=time.time_ns() // 1_000_000)  # none of an earlier test's numbers
    try:
        eventually(lambda: len(writer.told()) > 50, 30)
        yield writer
    finally:
        writer.stop()


def test_a_new_release_of_the_database_loses_no_write(three: Lab, user: TrioUser, app: str, writer: Writer) -> None:
    eventually(lambda: whole(three), 60)
    before = {str(peer["instance"]["meta"]["FLYNN_RELEASE_ID"]) for peer in peers(three).values()}  # type: ignore[index]
    began = time.monotonic()
    user.flynn("-a", "postgres", "env", "set", "X=1", timeout=400)
    seconds = time.monotonic() - began
    eventually(lambda: whole(three), 60)
    after = {str(peer["instance"]["meta"]["FLYNN_RELEASE_ID"]) for peer in peers(three).values()}  # type: ignore[index]
    assert len(after) == 1 and not after & before
    assert {home(three, peer).id for peer in peers(three).values()} == {member.id for member in three.nodes}
    count = len(writer.told())
    eventually(lambda: len(writer.told()) > count + 50, 30)
    told, gap = writer.told(), writer.gap()
    assert set(told) <= stored(user, app)
    print(f"\nreplaced in {seconds:.0f} s; {len(told)} writes acknowledged, none lost, longest gap {gap:.2f} s")
    assert gap < 15
    user.flynn("-a", app, "scale", "web=7")  # the controller has followed its database
    user.flynn("-a", app, "scale", "web=6")


def test_a_frozen_database_is_not_deployed(three: Lab, user: TrioUser) -> None:
    three.on(three.nodes[2], "flynn-host", "database", "freeze", "moving", "the", "racks")
    try:
        assert "frozen: moving the racks" in three.on(three.nodes[0], "flynn-host", "database", "status")
        refused = user.run("flynn", "-a", "postgres", "env", "set", "X=2", timeout=120)
        assert refused.returncode != 0
        assert "sirenia cluster is frozen: moving the racks" in refused.stdout + refused.stderr
    finally:
        three.on(three.nodes[1], "flynn-host", "database", "unfreeze")
    eventually(lambda: whole(three), 60)


def test_a_primary_that_is_cut_off_acknowledges_nothing(
    three: Lab, user: TrioUser, app: str, url: str, writer: Writer
) -> None:
    """Who reaches it on its own node is not answered; the others go on without it, and it comes back as one of them."""
    eventually(lambda: whole(three), 60)
    lost, address = home(three, peers(three)["primary"]), address_of_primary(three)
    rest = [member for member in three.nodes if member != lost]
    user.enter_through(rest[0])
    witness = Writer(rest[0], url, first=10_000_000)
    eventually(lambda: len(witness.told()) > 20, 30)
    network.cut(lost)
    began, cut_at = time.monotonic(), time.time()
    beside = Writer(lost, url, first=20_000_000, at=address)
    try:
        eventually(lambda: max(witness.told().values()) > cut_at + 1, 60, every=0.1)
        print(f"\nwritable without the primary's node after {time.monotonic() - began:.1f} s")
        eventually(lambda: address_of_primary(three, rest[0]) not in ("", address), 30)
        time.sleep(10)
        late = [number for number, at in beside.told().items() if at > cut_at + 1]
        assert late == [], "the former primary acknowledged writes"
    finally:
        beside.stop()
        network.mend(lost)
    began = time.monotonic()
    eventually(lambda: whole(three, rest[0]), 120)
    print(f"three peers again {time.monotonic() - began:.1f} s after the link was mended")
    witness.stop()
    writer.stop()
    user.enter_through(three.nodes[0])
    told = set(witness.told()) | set(writer.told())
    eventually(lambda: told - stored(user, app) == set(), 60)
