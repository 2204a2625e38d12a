"""Buildpacks: the three programs `bin/detect`, `bin/compile` and `bin/release` in a directory.

They run as the slug's user, in an environment that holds no credentials of the platform.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flynn.slugbuilder.output import indented


class StepFailed(Exception):
    """A step of the build ended with this exit status; what it had to say has been shown."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message or f"exit status {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs a program: a uid (its own group), or None for whoever we are."""

    uid: int | None
    environment: Mapping[str, str]

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        cwd: Path | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program as this account."""
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={**self.environment, **(extra or {})},
            user=self.uid,
            group=self.uid,
            extra_groups=None if self.uid is None else [],
        )

    def run(
        self, *argv: str | os.PathLike[str], stdin: IO[bytes] | int = subprocess.DEVNULL, cwd: Path | None = None
    ) -> None:
        """Run a program to its end. Raises StepFailed."""
        status = self.popen(argv, stdin=stdin, cwd=cwd).wait()
        if status:
            raise StepFailed(exit_status(status))


def exit_status(returncode: int) -> int:
    """Return a child's end as a shell reports it: 128 + n for signal n."""
    return 128 - returncode if returncode < 0 else returncode


@dataclass(frozen=True, slots=True)
class Buildpack:
    path: Path

    @property
    def name(self) -> str:
        """`07_nodejs` and `000007_nodejs` are called `nodejs`."""
        number, _, name = self.path.name.partition("_")
        return name if number.isdigit() and name else self.path.name

    def detect(self, account: Account, build: Path) -> str | None:
        """Return what the buildpack calls the app, or None if it does not want it."""
        program = self.path / "bin" / "detect"
        if not os.access(program, os.X_OK):
            return None
        child = account.popen([program, build], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=build)
        output, _ = child.communicate()
        return output.decode("utf-8", "replace").strip() if child.returncode == 0 else None

    def compile(self, account: Account, arguments: Sequence[Path], show: IO[bytes]) -> None:
        """Run the buildpack; its output is shown line by line. Raises StepFailed."""
        child = account.popen([self.path / "bin" / "compile", *arguments], stdout=subprocess.PIPE, cwd=arguments[0])
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                show.write(indented(line))
                show.flush()
        if status := child.wait():
            raise StepFailed(exit_status(status))

    def release(self, account: Account, arguments: Sequence[Path]) -> bytes:
        """Return what the buildpack says about running the app. Raises StepFailed."""
        program = self.path / "bin" / "release"
        if not os.access(program, os.X_OK):
            return b""
        child = account.popen([program, *arguments], stdout=subprocess.PIPE, cwd=arguments[0])
        output, _ = child.communicate()
        if child.returncode:
            raise StepFailed(exit_status(child.returncode))
        return output


def built_in(directory: Path) -> list[Buildpack]:
    """Return the buildpacks of the image, in order of preference."""
    return [Buildpack(path) for path in sorted(directory.iterdir()) if (path / "bin").is_dir()]


def by_name(directory: Path, name: str) -> Buildpack | None:
    """Return the built-in buildpack that `python` or `heroku/python` names."""
    wanted = name.removeprefix("heroku/")
    return next((buildpack for buildpack in built_in(directory) if buildpack.name == wanted), None)


def split_url(url: str) -> tuple[str, str]:
    """`url#treeish` as its two parts."""
    address, _, treeish = url.strip().partition("#")
    return address, treeish


def clone(account: Account, url: str, target: Path, proxies: Mapping[str, str]) -> Buildpack:
    """Fetch a custom buildpack. Raises StepFailed, after git's own words went to stderr."""
    address, treeish = split_url(url)
    if address.startswith("-") or treeish.startswith("-"):
        raise StepFailed(1, f"not the address of a buildpack: {url}")
    shutil.rmtree(target, ignore_errors=True)
    shallow = [] if treeish else ["--depth=1", "--shallow-submodules"]
    commands = [["git", "clone", "--quiet", "--recursive", *shallow, "--", address, str(target)]]
    if treeish:
        commands += [
            ["git", "-C", str(target), "checkout", "--quiet", treeish, "--"],
            ["git", "-C", str(target), "submodule", "--quiet", "update", "--init", "--recursive"],
        ]
    for command in commands:
        child = account.popen(command, extra={**proxies, "GIT_TERMINAL_PROMPT": "0"}, stdout=subprocess.DEVNULL)
        if status := child.wait():
            raise StepFailed(exit_status(status), f"could not fetch the buildpack {url}")
    shutil.rmtree(target / ".git", ignore_errors=True)
    return Buildpack(target)
