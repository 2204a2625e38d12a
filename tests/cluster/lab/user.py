"""Somebody who uses the cluster from outside, with the client, git and curl; and patience."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cluster.lab.cluster import environment
from tests.cluster.lab.layout import REPO

T = TypeVar("T")


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
