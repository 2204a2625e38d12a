"""What carries the platform gets a new release on three nodes, and nobody who uses it can tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.cluster.conftest import eventually
from tests.cluster.lab.layout import Node
from tests.cluster.test_4_operation import Traffic
from tests.cluster3.conftest import APP, Lab, TrioUser

pytestmark = pytest.mark.cluster3

WRITABLE_SECONDS = 6  # how long one write may take meanwhile, with all its tries; most take milliseconds


class Writing(threading.Thread):
    """Somebody who writes to the directory all the time, through one node and then the next."""

    def __init__(self, three: Lab) -> None:
        super().__init__(daemon=True)
        self._three = three
        self._over = threading.Event()
        self.done, self.longest = 0, 0.0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._over.wait(0.05):
            began = time.monotonic()
            try:
                self._write(f"written-{self.done}", began + 3 * WRITABLE_SECONDS)
            except AssertionError as error:
                self.wrong.append(str(error))
                return
            self.done += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def _write(self, service: str, deadline: float) -> None:
        said = ""
        while time.monotonic() < deadline:
            for member in self._three.nodes:
                said = self._put(member, service)
                if " 200 " in said or " 409 " in said:  # 409: a try whose answer was lost
                    return
        raise AssertionError(f"{service} could not be written: {said}")

    def _put(self, member: Node, service: str) -> str:
        options = ("-X", "PUT", "-H", "'Content-Type: application/json'", "-d", "'{}'")
        try:
            return self._three.discoverd(member, f"/services/{service}", *options).splitlines()[0]
        except (AssertionError, IndexError) as error:
            return repr(error)  # curl: nobody listens

    def __enter__(self) -> Writing:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join(60)


@pytest.fixture
def traffic(three: Lab, app: str) -> Iterator[list[Traffic]]:
    """Requests through every node's router."""
    host = f"{APP}.{three.domain}"
    first, second, third = (Traffic(member.ip, host) for member in three.nodes)
    with first, second, third:
        yield [first, second, third]


def releases(three: Lab, name: str) -> dict[str, set[str]]:
    """Of which releases an app's jobs are, on each node."""
    found: dict[str, set[str]] = {member.id: set() for member in three.nodes}
    for member in three.nodes:
        for job in three.jobs(member):
            metadata = job["job"]["metadata"]  # type: ignore[index]
            if metadata.get("flynn-controller.app_name") == name:
                found[member.id].add(metadata["flynn-controller.release"])
    return found


def test_the_directory_gets_a_new_release_node_by_node(three: Lab, user: TrioUser, traffic: list[Traffic]) -> None:
    with Writing(three) as writing:
        eventually(lambda: writing.done > 5, 20)
        began = time.monotonic()
        user.flynn("-a", "discoverd", "env", "set", f"OPERATED=yes-{int(time.time())}", timeout=200)
        took = time.monotonic() - began
        written = writing.done
        eventually(lambda: writing.done > written + 5, 20)
    now = user.flynn("-a", "discoverd", "release", "-q").split()[0]
    eventually(lambda: releases(three, "discoverd") == {member.id: {now} for member in three.nodes}, 60)
    asked = sum(one.asked for one in traffic)
    print(f"\ndeployed in {took:.1f} s; {writing.done} writes, longest {writing.longest:.2f} s; {asked} requests")
    assert [one.failed for one in traffic] == [[], [], []]
    assert writing.wrong == []
    assert writing.longest < WRITABLE_SECONDS
    assert sorted(three.roles().values()) == ["peer", "peer", "peer (leader)"]
    assert user.run("flynn", "-a", APP, "run", "echo", "works", timeout=60).stdout == "works\n"
