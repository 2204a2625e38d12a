"""A running development cluster, and a user of it with a shell of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.cluster.lab import hosts_file, node
from tests.cluster.lab.cluster import PUBLISHED, Phases, environment, up
from tests.cluster.lab.layout import REPO, Node, names

T = TypeVar("T")
APPS = ("shop", "blog", "site", "broken", "jobs", "spy")


class User:
    """Runs commands as somebody who sourced `.cluster/env`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = environment()
        self.domain = self.env["CLUSTER_DOMAIN"]

    def run(
        self, *command: str, cwd: Path | None = None, stdin: str = "", timeout: float = 180
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.env, cwd=cwd or self.home, input=stdin, capture_output=True, text=True, timeout=timeout
        )

    def flynn(self, *arguments: str, **more: object) -> str:
        """A `flynn` command that must succeed; what it printed, errors included."""
        done = self.run("flynn", *arguments, **more)  # type: ignore[arg-type]  # the options of `run`
        assert done.returncode == 0, f"flynn {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def app(self, name: str, sample: str) -> Path:
        """A new app with the sample's code in a repository, ready to be pushed."""
        directory = self.home / name
        shutil.copytree(REPO / "tests" / "apps" / sample, directory)
        self.git(directory, "init", "-q", "-b", "master")
        self.commit(directory, "first")
        self.flynn("create", "--yes", name, cwd=directory)
        return directory

    def commit(self, directory: Path, message: str) -> None:
        self.git(directory, "add", "-A")
        self.git(
            directory, "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", message, "--allow-empty"
        )

    def git(self, directory: Path, *arguments: str) -> str:
        done = self.run("git", *arguments, cwd=directory, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def push(self, directory: Path) -> subprocess.CompletedProcess[str]:
        return self.run("git", "push", "flynn", "master", cwd=directory, timeout=600)

    def get(self, url: str, *options: str) -> tuple[int, str]:
        """Status and body, by curl."""
        done = self.run("curl", "-sS", "-m", "15", "-w", "\n%{http_code}", *options, url)
        body, _, status = done.stdout.rpartition("\n")
        return int(status or 0), body

    def url(self, app: str, scheme: str = "http") -> str:
        return f"{scheme}://{app}.{self.domain}/"


def eventually(holds: Callable[[], T], seconds: float = 60, every: float = 0.3) -> T:
    """Wait until `holds()` is true (asserting inside it is fine); its value."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = holds()
            if value:
                return value
            reason = f"still {value!r}"
        except (AssertionError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {reason}")
        time.sleep(every)


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
