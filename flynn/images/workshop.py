"""Where layers are made: private mounts, overlays, programs run in a chroot.

Everything is mounted in a mount namespace of its own, and what runs in the chroot is in a PID namespace that dies with
its parent. So whatever happens to the builder, no mount and no process is left on the machine; only a work directory
may stay behind, which the next build removes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.images.machine import Machine

CLONE_NEWNS = 0x00020000
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
OFFERED = "/run/flynn-build"  # where the chroot finds the machine's settings; /run is a tmpfs during the build
OFFERED_CA = f"{OFFERED}/ca-certificates.crt"


class StepFailed(Exception):
    """A program of a build ended badly; carries the end of its output."""

    def __init__(self, what: str, status: int, log: Path) -> None:
        self.tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        super().__init__(f"{what} ended with status {status}; the whole output is in {log}\n{self.tail}")


def private_mounts() -> None:
    """Give this process a mount namespace of its own, so that its mounts vanish with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"building images needs root: unshare: {os.strerror(errno)}")
    mount("--make-rprivate", "/")


def mount(*args: str | Path) -> None:
    subprocess.run(["mount", *map(str, args)], check=True)


@contextmanager
def mounted(target: Path, *args: str | Path) -> Iterator[Path]:
    """Mount on `target` (made if absent) for the length of the block; whatever is mounted below goes with it."""
    target.mkdir(parents=True, exist_ok=True)
    mount(*args, target)
    try:
        yield target
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(target)], check=True)


@contextmanager
def overlay(lower: Sequence[Path], work: Path) -> Iterator[tuple[Path, Path]]:
    """An overlay of `lower` (bottom first) for the length of the block; yields its root and its upper directory.

    Redirects and metadata-only copies are off: the upper directory must be complete, because it becomes a layer.
    """
    upper, scratch, root = work / "upper", work / "scratch", work / "root"
    for directory in (upper, scratch):
        directory.mkdir(parents=True)
    stack = ":".join(str(path) for path in reversed(lower))
    options = f"lowerdir={stack},upperdir={upper},workdir={scratch},redirect_dir=off,metacopy=off,index=off"
    with mounted(root, "-t", "overlay", "overlay", "-o", options):
        yield root, upper
    root.rmdir()


@contextmanager
def layers_mounted(squashes: Sequence[Path], work: Path) -> Iterator[list[Path]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(mounted(work / f"lower{number}", "-t", "squashfs", "-o", "loop,ro", squash))
            for number, squash in enumerate(squashes)
        ]


@dataclass(frozen=True, slots=True)
class Chroot:
    """A root file system in which programs can be run, with the machine's settings offered to them."""

    root: Path
    machine: Machine
    log: Path

    def run(self, what: str, script: str, env: Mapping[str, str] | None = None) -> None:
        """Run a script by `bash -eu` as root of the chroot; its output goes to the log.

        Raises:
            StepFailed: it did not end with status 0.
        """
        environment = {
            "HOME": "/root",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "APT_CONFIG": f"{OFFERED}/apt.conf",
            **self.machine.environment(OFFERED_CA),
            **self.machine.pip_environment(),
            **self.machine.npm_environment(),
            **(env or {}),
        }
        command = ["chroot", str(self.root), "/bin/bash", "-euc", script]
        run_logged(what, command, self.log, environment, proc=self.root / "proc")


def run_logged(
    what: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, proc: Path = Path("/proc")
) -> None:
    """Run a program in a PID namespace of its own, with its /proc on `proc`: it dies with us, whatever kills us.

    Raises:
        StepFailed: it did not end with status 0.
    """
    alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={proc}"]
    with log.open("ab") as output:
        output.write(f"=== {what}\n".encode())
        output.flush()
        status = subprocess.run(
            [*alone, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, check=False
        ).returncode
    if status != 0:
        raise StepFailed(what, status, log)


@contextmanager
def furnished(root: Path, machine: Machine, sources: Sequence[str], downloads: Path, log: Path) -> Iterator[Chroot]:
    """Mount devices, scratch file systems and the machine's settings into `root`; nothing of it stays in the tree.

    `downloads` keeps package lists and packages for the length of one build, so that several layers share them.
    """
    with ExitStack() as stack:
        for directory in ("run", "tmp", "var/tmp"):
            stack.enter_context(mounted(root / directory, "-t", "tmpfs", "-o", "mode=1777", "tmpfs"))
        dev = stack.enter_context(mounted(root / "dev", "-t", "tmpfs", "-o", "mode=755", "tmpfs"))
        for name in DEVICES:
            (dev / name).touch()
            mount("--bind", f"/dev/{name}", dev / name)
        for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
            (dev / link).symlink_to(target)
        (dev / "shm").mkdir(mode=0o1777)
        (root / "proc").mkdir(exist_ok=True)
        for inside in ("var/lib/apt/lists", "var/cache/apt/archives"):
            outside = downloads / inside
            (outside / "partial").mkdir(parents=True, exist_ok=True)
            stack.enter_context(mounted(root / inside, "--bind", outside))
        _offer(root, machine, sources)
        mount("--bind", "/etc/resolv.conf", root / "etc/resolv.conf")
        stack.callback(subprocess.run, ["umount", str(root / "etc/resolv.conf")], check=True)
        yield Chroot(root, machine, log)


def _offer(root: Path, machine: Machine, sources: Sequence[str]) -> None:
    offered = root / OFFERED.lstrip("/")
    offered.mkdir()
    (offered / "sources.list").write_text("".join(f"{line}\n" for line in sources))
    (offered / "ca-certificates.crt").write_bytes(machine.ca_bundle)
    # "exit 101" tells package scripts that no service may be started here.
    (offered / "policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (offered / "policy-rc.d").chmod(0o755)
    options = [
        *machine.apt_options,
        f'Dir::Etc::SourceList "{OFFERED}/sources.list";',
        'Dir::Etc::SourceParts "/dev/null";',
        'APT::Install-Recommends "0";',
        'APT::Sandbox::User "root";',
        'Acquire::Languages "none";',
        # Package indexes are kept compressed: the cache is built in memory for one run only.
        'Dir::Cache::pkgcache "";',
        'Dir::Cache::srcpkgcache "";',
        'Dpkg::Options { "--force-confold"; "--force-unsafe-io"; };',
        'Dpkg::Use-Pty "0";',
    ]
    if machine.ca_bundle:
        options.append(f'Acquire::https::CaInfo "{OFFERED_CA}";')
    (offered / "apt.conf").write_text("".join(f"{line}\n" for line in options))


def remove_tree(path: Path) -> None:
    """Remove a work directory. Mounts are gone by then; `rm --one-file-system` would stop at one that is not."""
    if path.exists():
        subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=True)
