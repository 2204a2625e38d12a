"""The platform is operated with its own tools: its apps are deployed and scaled while users' requests go on."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Operator
from tests.cluster.lab.user import User, eventually
from tests.cluster.test_3_recovery import machine_pid

pytestmark = pytest.mark.cluster

PAUSE_SECONDS = 0.01
SYSTEM_APPS = [
    "status",
    "logaggregator",
    "gitreceive",
    "blobstore",
    "router",
    "flannel",
    "discoverd",
    "postgres",
    "controller",
]


class Traffic:
    """Asks for a page over and over, each time on a connection of its own, and notes what failed and when."""

    def __init__(self, address: str, host: str) -> None:
        self._address, self._host = address, host
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.asked = 0
        self.failed: list[tuple[float, str]] = []
        self.longest = 0.0

    def __enter__(self) -> Traffic:
        self._thread.start()
        eventually(lambda: self.asked > 3, 20)
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._end.wait(PAUSE_SECONDS):
            began = time.monotonic()
            failure = self._ask()
            self.asked += 1
            self.longest = max(self.longest, time.monotonic() - began)
            if failure:
                self.failed.append((round(time.time(), 2), failure))

    def _ask(self) -> str:
        connection = http.client.HTTPConnection(self._address, 80, timeout=10)
        try:
            connection.request("GET", "/", headers={"Host": self._host, "Connection": "close"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()
        return "" if answer.status == 200 else f"status {answer.status}"


@pytest.fixture
def traffic(user: User, shop: Path) -> Iterator[Traffic]:
    with Traffic(user.env["NODE_IPS"].split(",")[0], f"shop.{user.domain}") as traffic:
        yield traffic


def releases_of_jobs(operator: Operator, app: str) -> set[str]:
    """The releases that an app's running jobs are of."""
    found = set()
    for job in operator.jobs():
        metadata = job["job"]["metadata"]  # type: ignore[index]
        if metadata.get("flynn-controller.app_name") == app and job.get("status", 0) in (0, 1):
            found.add(metadata["flynn-controller.release"])
    return found


@pytest.mark.parametrize("app", SYSTEM_APPS)
def test_a_part_of_the_platform_is_deployed_and_no_request_fails(
    user: User, operator: Operator, traffic: Traffic, app: str
) -> None:
    before = user.flynn("-a", app, "release", "-q").split()[0]
    began = time.monotonic()
    user.flynn("-a", app, "env", "set", f"OPERATED=yes-{int(time.time())}", timeout=120)
    took = time.monotonic() - began
    now = user.flynn("-a", app, "release", "-q").split()[0]
    assert now != before
    eventually(lambda: releases_of_jobs(operator, app) == {now}, 40)
    assert user.run("flynn", "-a", "shop", "run", "echo", "works", timeout=60).stdout == "works\n"
    print(f"{app}: {took:.1f} s, {traffic.asked} requests, longest {traffic.longest:.2f} s")
    assert traffic.failed == []


def test_what_was_stored_before_is_still_there(user: User, shop: Path) -> None:
    """Blobstore, discoverd and PostgreSQL have new releases; the repository, the app and its route do not know."""
    head = user.git(shop, "rev-parse", "HEAD").split()[0]
    assert head in user.git(shop, "ls-remote", "flynn")
    user.commit(shop, "after the deployments")
    pushed = user.push(shop)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    builds = [line for line in user.flynn("-a", "shop", "ps", "-a").splitlines() if " slugbuilder " in line]
    assert len(builds) >= 2, "the first one, made before there was a release, and this one"


@pytest.mark.parametrize(
    ("app", "process", "usual"),
    [("controller", "web", 2), ("blobstore", "web", 1), ("gitreceive", "app", 1), ("postgres", "web", 1)],
)
def test_a_part_of_the_platform_is_scaled(user: User, traffic: Traffic, app: str, process: str, usual: int) -> None:
    for count in (usual + 1, usual):
        user.flynn("-a", app, "scale", f"{process}={count}", timeout=60)
        rows = [line.split() for line in user.flynn("-a", app, "ps").splitlines()[1:]]
        assert [row[1:3] for row in rows if row[1] == process and row[2] != "stopping"] == [[process, "up"]] * count
    assert traffic.failed == []


@pytest.mark.parametrize("app", ["postgres", "discoverd", "controller"])
def test_what_the_platform_cannot_be_without_is_not_scaled_away(user: User, app: str) -> None:
    process = {"postgres": "postgres", "discoverd": "app", "controller": "web"}[app]
    done = user.run("flynn", "-a", app, "scale", f"{process}=0")
    assert done.returncode != 0
    assert "the platform cannot be without it" in done.stderr


def signal_workers(operator: Operator, number: signal.Signals) -> None:
    for job in operator.jobs():
        metadata = job["job"]["metadata"]  # type: ignore[index]
        if metadata.get("flynn-controller.type") == "worker" and job.get("status") == 1:
            init = machine_pid(job)
            daemons = Path(f"/proc/{init}/task/{init}/children").read_text().split()
            for pid in map(int, daemons):
                os.kill(pid, number)


def test_a_release_that_crashes_is_rolled_back_though_the_workers_were_killed(
    user: User, operator: Operator, traffic: Traffic
) -> None:
    signal_workers(operator, signal.SIGSTOP)
    deploying = subprocess.Popen(
        ["flynn", "-a", "shop", "env", "set", "PYTHONHOME=/nowhere"], env=user.env, stderr=subprocess.PIPE, text=True
    )
    eventually(lambda: "pending" in user.flynn("-a", "shop", "deployment").splitlines()[1], 20, every=0.05)
    second = user.run("flynn", "-a", "shop", "env", "set", "ROUND=2")
    assert second.returncode != 0
    assert "Cannot create deploy, there is already one in progress for this app." in second.stderr
    signal_workers(operator, signal.SIGCONT)
    time.sleep(0.4)
    signal_workers(operator, signal.SIGKILL)
    _, said = deploying.communicate(timeout=120)
    assert deploying.returncode != 0
    assert "web job failed to start" in said
    last = user.flynn("-a", "shop", "deployment").splitlines()[1]
    assert "failed" in last and "web job failed to start" in last
    assert "PYTHONHOME" not in user.flynn("-a", "shop", "env")
    assert "down" in user.flynn("-a", "shop", "ps", "-a")
    assert traffic.failed == []


def test_a_deployment_is_done_though_no_worker_was_alive_when_it_began(
    user: User, operator: Operator, traffic: Traffic
) -> None:
    signal_workers(operator, signal.SIGKILL)
    user.flynn("-a", "shop", "env", "set", "ROUND=3", timeout=90)
    assert "ROUND=3" in user.flynn("-a", "shop", "env")
    assert traffic.failed == []


def test_a_database_that_does_not_start_makes_way_for_the_one_before(user: User, traffic: Traffic) -> None:
    """While it is away there is no controller that could roll back: the scheduler does it from memory."""
    done = user.run("flynn", "-a", "postgres", "env", "set", "-t", "postgres", "PATH=/nowhere", timeout=120)
    assert done.returncode != 0
    eventually(lambda: "failed" in user.flynn("-a", "postgres", "deployment").splitlines()[1], 60)
    assert "PATH" not in user.flynn("-a", "postgres", "env", "-t", "postgres")
    assert "ROUND=3" in user.flynn("-a", "shop", "env")
    assert traffic.failed == []


def test_scaled_to_nothing_and_back(user: User, shop: Path) -> None:
    user.flynn("-a", "shop", "scale", "web=0")
    eventually(lambda: user.get(user.url("shop"))[0] == 503, 20)
    assert user.flynn("-a", "shop", "ps", "-q").split() == []
    unknown = user.run("flynn", "-a", "shop", "scale", "nosuch=1")
    assert unknown.returncode != 0 and "nosuch" in unknown.stderr
    user.flynn("-a", "shop", "scale", "web=2")
    eventually(lambda: user.get(user.url("shop"))[0] == 200, 20)


def test_a_job_that_keeps_crashing_waits_longer_and_longer(user: User) -> None:
    user.flynn("-a", "shop", "env", "set", "-t", "clock", "PATH=/nowhere")
    user.run("flynn", "-a", "shop", "scale", "--no-wait", "clock=1")
    try:
        eventually(lambda: " pending " in user.flynn("-a", "shop", "ps", "-a").replace("\t", " "), 40)
        listed = user.flynn("-a", "shop", "ps", "-a")
        assert sum("clock" in line and "down" in line for line in listed.splitlines()) >= 5, listed
    finally:
        user.run("flynn", "-a", "shop", "scale", "--no-wait", "clock=0")
