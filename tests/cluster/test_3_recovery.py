"""kill -9 of every part, and the power cut of the node: the platform is whole again by itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Operator
from tests.cluster.lab import node
from tests.cluster.lab.user import User, eventually

pytestmark = pytest.mark.cluster

DATA_PATH_UNTOUCHED = [
    "controller web",
    "controller scheduler",
    "controller worker",
    "blobstore web",
    "gitreceive app",
    "logaggregator app",
    "postgres postgres",
    "flannel app",
    "discoverd app",
    "status web",
]


def platform_works(user: User) -> bool:
    """The app answers, the API answers, and something new can be started."""
    assert user.get(user.url("shop"))[0] == 200
    done = user.run("flynn", "-a", "shop", "run", "echo", "works", timeout=40)
    assert done.stdout == "works\n", done.stderr
    return True


@pytest.mark.parametrize("job", DATA_PATH_UNTOUCHED)
def test_a_killed_daemon_comes_back_and_the_app_never_noticed(
    user: User, operator: Operator, shop: Path, job: str
) -> None:
    app, process = job.split()
    victim = operator.job(app, process)
    os.kill(machine_pid(victim), signal.SIGKILL)
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        assert user.get(user.url("shop"))[0] == 200
    eventually(lambda: operator.job(app, process)["job"]["id"] != victim["job"]["id"], 60)  # type: ignore[index]
    eventually(lambda: platform_works(user), 90)


def test_the_router_comes_back(user: User, operator: Operator, shop: Path) -> None:
    victim = operator.job("router", "app")
    os.kill(machine_pid(victim), signal.SIGKILL)
    eventually(lambda: operator.job("router", "app")["job"]["id"] != victim["job"]["id"], 60)  # type: ignore[index]
    eventually(lambda: platform_works(user), 90)


def test_flynn_host_is_killed_and_no_job_notices(user: User, operator: Operator, shop: Path) -> None:
    before = {job["job"]["id"] for job in operator.jobs()}  # type: ignore[index]
    status = operator.run("flynn-host", "status", "--json")
    import json

    inside = json.loads(status.stdout)["pid"]
    operator.run("kill", "-9", str(inside))
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        assert user.get(user.url("shop"))[0] == 200
    eventually(lambda: {job["job"]["id"] for job in operator.jobs()} == before, 30)  # type: ignore[index]
    eventually(lambda: platform_works(user), 60)


def test_a_power_cut_of_the_node(user: User, operator: Operator, shop: Path) -> None:
    if "DATABASE_URL" not in user.flynn("-a", "shop", "env"):
        user.flynn("-a", "shop", "resource", "add", "postgres")
    user.flynn(
        "-a", "shop", "pg", "psql", "--", "-c", "CREATE TABLE IF NOT EXISTS kept (v int); INSERT INTO kept VALUES (41)"
    )
    node.power_cut(operator.node)
    from tests.cluster.lab import network

    network.plug_in(operator.node)
    node.switch_on(operator.node)
    eventually(lambda: user.get(user.url("shop"))[0] == 200, 180)
    eventually(lambda: platform_works(user), 180)
    done = user.run("flynn", "-a", "shop", "pg", "psql", "--", "-tc", "SELECT v FROM kept")
    assert "41" in done.stdout, done.stderr


def machine_pid(job: dict[str, object]) -> int:
    """The pid of a container's first process as the machine numbers it, from the one the node's daemon reports."""
    wanted = int(str(job["pid"]))
    init = node.init_pid(node_zero())
    assert init is not None
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        numbers = fields.get("NSpid", "").split()
        inside_node = len(numbers) >= 2 and int(numbers[1]) == wanted
        if inside_node and os.readlink(f"/proc/{init}/ns/pid") == _parent_namespace(int(numbers[0]), len(numbers)):
            return int(numbers[0])
    raise AssertionError(f"no process {wanted} in the node")


def _parent_namespace(pid: int, depth: int) -> str:
    """The process namespace that contains the one `pid` is in (a container's first process has its own)."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return os.readlink(f"/proc/{pid if depth == 2 else parent}/ns/pid")


def node_zero() -> node.Node:
    return node.Node(0)
