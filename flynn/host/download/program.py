"""Bring the program of a release onto this host: beside the one that runs, never over it.

    <programs>/<version>/bin/flynn-host ...   a Python environment of its own, complete once `flynn-version` is in it

What is installed comes from the repository alone, by its signatures; no package index is asked.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from flynn.host.download.errors import DownloadFailed, Reason, Refused
from flynn.host.download.pull import checked_version, unpacked
from flynn.host.download.trust import TrustedRepository
from flynn.types.codec import decode
from flynn.types.errors import ApiError
from flynn.types.program import Program, program_target, python_kind
from flynn.version import STAMP

PROGRAMS = ("flynn-host", "flynn")  # what links lead to
INSTALL_SECONDS = 600.0


def own_kind() -> str:
    return python_kind(sys.version_info.major, sys.version_info.minor, sysconfig.get_platform())


def install(repository: TrustedRepository, version: str, programs: Path) -> dict[str, str]:
    """Have the program of a release below `programs`; returns the paths of its commands. Blocking; may be repeated.

    Raises:
        DownloadFailed: also when the program is not for this machine, or does not run on it.
    """
    version = checked_version(version)
    try:
        programs.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (programs / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one installation at a time
            return _installed(repository, version, programs)
    except OSError as error:
        raise DownloadFailed(f"{programs}: {error.strerror or error}") from error


def _installed(repository: TrustedRepository, version: str, programs: Path) -> dict[str, str]:
    directory = programs / version
    if not _complete(directory, version):
        program = _read(repository, version)
        if program.python != own_kind():
            raise DownloadFailed(f"the program of {version} is for {program.python}, this machine has {own_kind()}")
        wheels = programs / f".{version}.wheels"
        try:
            wheels.mkdir(mode=0o755, parents=True, exist_ok=True)
            files = [_fetch(repository, wheel.target, wheel.name, wheels) for wheel in program.wheels]
            # Made where it stays, because its scripts name their place; an unfinished one is made anew.
            shutil.rmtree(directory, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(directory)])
            pip = [str(directory / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, "--no-index", "--no-deps", *map(str, files)])
            said = _run([str(directory / "bin/flynn-host"), "--help"])
            if "daemon" not in said:
                raise DownloadFailed(f"the program of {version} does not run: {said[-500:]}")
            os.sync()  # the stamp says that all of it is there, also after a power cut
            (directory / STAMP).write_text(f"{version}\n")
            _prune(programs, {directory, Path(sys.prefix)})
        finally:
            shutil.rmtree(wheels, ignore_errors=True)
    return {name: str(directory / "bin" / name) for name in PROGRAMS}


def _prune(programs: Path, keep: set[Path]) -> None:
    """Remove all but the newest program and the one that runs, to which the newest may have to give way."""
    for found in programs.iterdir():
        if found.is_dir() and found not in keep:
            shutil.rmtree(found, ignore_errors=True)


def _complete(directory: Path, version: str) -> bool:
    try:
        return (directory / STAMP).read_text().strip() == version
    except OSError:
        return False


def _read(repository: TrustedRepository, version: str) -> Program:
    name = program_target(version)
    try:
        program = decode(unpacked(repository.read(name)), Program)
    except (ApiError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise Refused(Reason.MALFORMED, name, str(error)) from error
    for wheel in program.wheels:
        if "/" in wheel.name or not wheel.name.endswith(".whl"):
            raise Refused(Reason.MALFORMED, name, f"{wheel.name!r} is no wheel")
    return program


def _fetch(repository: TrustedRepository, target: str, name: str, wheels: Path) -> Path:
    part = repository.fetch_beside(target)
    try:
        shutil.move(part, wheels / name)
    finally:
        part.unlink(missing_ok=True)
    return wheels / name


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadFailed(f"{command[0]}: {error}") from error
    if done.returncode:
        raise DownloadFailed(f"{' '.join(command[:4])} ...: {(done.stderr or done.stdout).strip()[-1000:]}")
    return done.stdout
