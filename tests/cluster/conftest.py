"""A running development cluster, and a user of it with a shell of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import hosts_file, node
from tests.cluster.lab.cluster import PUBLISHED, Phases, up
from tests.cluster.lab.layout import Node, names
from tests.cluster.lab.user import User, eventually

APPS = ("shop", "blog", "site", "broken", "jobs", "spy")


class Operator:
    """Somebody with a root shell on the node."""

    def __init__(self) -> None:
        self.node = Node(0)

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        env = node.command_environment(self.node)
        return subprocess.run(node.inside(self.node, command), env=env, capture_output=True, text=True, timeout=timeout)

    def jobs(self) -> list[dict[str, object]]:
        """The active jobs, as `flynn-host ps --json` lists them."""
        done = self.run("flynn-host", "ps", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found

    def job(self, app: str, process: str) -> dict[str, object]:
        for job in self.jobs():
            metadata = job["job"]["metadata"]  # type: ignore[index]
            named = (metadata.get("flynn-controller.app_name"), metadata.get("flynn-controller.type"))
            if named == (app, process) and job.get("status") == 1:
                return job
        raise AssertionError(f"no running job of {app} {process}")


@pytest.fixture(scope="session")
def cluster() -> None:
    if os.geteuid() != 0:
        pytest.skip("a development cluster needs root")
    if not (PUBLISHED / "env").exists() or node.init_pid(Node(0)) is None:
        up(1, Phases())


@pytest.fixture(scope="session")
def user(cluster: None) -> Iterator[User]:
    home = Path(tempfile.mkdtemp(prefix="flynn-user-"))
    someone = User(home)
    hosts_file.publish(Node(0).ip, names(someone.domain, ("hello", *APPS, "other")))
    yield someone
    for app in APPS:
        someone.run("flynn", "-a", app, "delete", "--yes")
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def operator(cluster: None) -> Operator:
    return Operator()


@pytest.fixture(scope="session")
def shop(user: User) -> Path:
    """A Python app that was pushed and answers."""
    directory = user.app("shop", "python")
    pushed = user.push(directory)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    eventually(lambda: user.get(user.url("shop"))[0] == 200)
    return directory
