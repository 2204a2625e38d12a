"""A Debian machine with systemd that `make install` was run on, booted in systemd-nspawn.

What takes long is kept below /var/cache/flynn/tests, by a key of what it is made of: the Debian tree, the wheels of
what Flynn needs, and the tree's Python environment. `make install` itself runs anew each time, over all that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.images import machine as machines
from flynn.types.host import Mountspec

from .machine import TestMachine, remove_cgroups

SOURCES = Path(__file__).parents[2]
CACHE = Path(os.environ.get("FLYNN_CACHE") or "/var/cache/flynn") / "tests"
SUITE = "bookworm"
BOOT_PACKAGES = ("systemd", "systemd-sysv", "dbus", "make")
CONTROLLERS = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
#: Services of the packages that are not this test's affair.
MASKED = ("zfs-fuse", "postgresql", "haproxy", "getty@tty1", "console-getty", "systemd-networkd", "systemd-resolved")
LOOP_DEVICES = 256
HALT = signal.SIGRTMIN + 4  # to systemd: power off


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What machines are made of, in the cache."""

    debian: Path
    installed: Path  # an overlay on `debian`: what a first `make install` has added
    wheels: Path


def ingredients() -> Ingredients:
    """Make what is not in the cache: minutes at the first time, nothing later."""
    packages = [*BOOT_PACKAGES, *(SOURCES / "packages.txt").read_text().split()]
    debian_key = _key(SUITE, *packages)
    python_key = _key(debian_key, (SOURCES / "pyproject.toml").read_text(), sys.version)
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        debian = _made(f"debian-{debian_key}", lambda work: _bootstrap(work, packages))
        wheels = _made(f"wheels-{python_key}", _wheels)
        installed = _made(f"installed-{python_key}", lambda work: _install_first(debian, wheels, work))
        for kept in CACHE.iterdir():
            if kept.is_dir() and kept not in (debian, wheels, installed):
                shutil.rmtree(kept)  # of another version of the sources
    return Ingredients(debian, installed, wheels)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _made(name: str, make: object) -> Path:
    path, work = CACHE / name, CACHE / f"new-{name}"
    if not path.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        make(work)  # type: ignore[operator]
        work.rename(path)
    return path


def _run(command: Sequence[str], *, env: dict[str, str] | None = None, seconds: float = 900) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _bootstrap(work: Path, packages: Sequence[str]) -> None:
    machine = machines.find()
    options, sources = work.with_suffix(".apt"), work.with_suffix(".list")
    options.write_text("".join(f"{line}\n" for line in machine.apt_options))
    sources.write_text("".join(f"{line}\n" for line in machines.for_suite(machine.apt_sources, SUITE)))
    work.rmdir()
    try:
        _run(
            [
                "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", f"--aptopt={options}",
                f"--include={','.join(packages)}", SUITE, str(work), str(sources),
            ]
        )  # fmt: skip
    finally:
        options.unlink()
        sources.unlink()


def _wheels(work: Path) -> None:
    """Fetch and build as this machine is configured to; in the tree there is no network."""
    wanted = [f"{SOURCES}[node,machine]", "setuptools>=68", "wheel"]
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--use-pep517", "-w", str(work), *wanted])


def _install_first(debian: Path, wheels: Path, work: Path) -> None:
    with _overlay([debian], work) as root:
        _copy_sources(root)
        make_install(root, wheels)
    shutil.rmtree(work.with_name(f"{work.name}.work"), ignore_errors=True)


@contextmanager
def _overlay(lower: Sequence[Path], upper: Path) -> Iterator[Path]:
    work, root = upper.with_name(f"{upper.name}.work"), upper.with_name(f"{upper.name}.root")
    for directory in (work, root, upper):
        directory.mkdir(exist_ok=True)
    options = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}"
    _run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)])
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", str(root)], check=False)
        root.rmdir()


def _copy_sources(root: Path) -> None:
    target = root / "usr/src/flynn"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("Makefile", "README.md", "packages.txt", "pyproject.toml"):
        shutil.copy(SOURCES / name, target)
    for name in ("flynn", "systemd"):
        shutil.copytree(SOURCES / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def make_install(root: Path, wheels: Path) -> None:
    """Run `make install` as an operator would, from a copy of the sources."""
    _run(
        [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", "-D", str(root),
            f"--bind-ro={wheels}:/wheels", "--setenv=PIP_NO_INDEX=1", "--setenv=PIP_FIND_LINKS=/wheels",
            "make", "-C", "/usr/src/flynn", "install",
        ]
    )  # fmt: skip


def release_wheels(made_of: Ingredients, into: Path) -> Path:
    """What a release of the present sources carries for its hosts."""
    into.mkdir()
    for wheel in made_of.wheels.glob("*.whl"):
        if not wheel.name.startswith("flynn-"):
            shutil.copy(wheel, into)
    copy = into.with_name("sources")  # pip leaves its builds beside what it builds
    _copy_sources(copy)
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(into), str(copy / "usr/src/flynn")])
    return into


class BootedMachine(TestMachine):
    """A node whose daemon is a unit of the systemd in it."""

    __test__ = False
    leader = 0  # systemd, seen from outside
    nspawn: subprocess.Popen[bytes] | None = None
    root = Path()

    @contextmanager
    def running(self, made_of: Ingredients) -> Iterator[None]:
        """Install, boot, and set up flynn-host without starting it; power off in the end."""
        self.directory.mkdir(exist_ok=True)
        self.connect()
        try:
            with _overlay([made_of.installed, made_of.debian], self.directory / "tree") as self.root:
                _copy_sources(self.root)
                make_install(self.root, made_of.wheels)
                self.state, self.config = self.root / "var/lib/flynn", self.root / "etc/flynn"
                file = Path(self.image.url.removeprefix("file://"))
                shutil.copy(file, self.root / "var" / file.name)
                for unit in MASKED:
                    (self.root / f"etc/systemd/system/{unit}.service").unlink(missing_ok=True)
                    (self.root / f"etc/systemd/system/{unit}.service").symlink_to("/dev/null")
                try:
                    self._boot()
                    yield
                finally:
                    self._power_off()
        finally:
            self.remove()

    @property
    def image_inside(self) -> Mountspec:
        """The layer, by its path in the machine."""
        return Mountspec(
            type="squashfs",
            id=self.image.id,
            url=f"file:///var/{Path(self.image.url).name}",
            size=self.image.size,
            hashes=self.image.hashes,
        )

    def inside(self, *command: str, check: bool = True) -> str:
        """Run a command as root of the machine; its output."""
        done = subprocess.run(
            ["nsenter", f"--target={self.leader}", "-m", "-p", "-n", "-i", "-u", "-C", "--", *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            journal = self.inside("journalctl", "-u", "flynn-host", "--no-pager", "-n", "30", check=False)
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}\n{journal}")
        return done.stdout + done.stderr

    def unit(self, name: str) -> str:
        """A property of the unit."""
        return self.inside("systemctl", "show", "flynn-host", f"--property={name}", "--value").strip()

    def _boot(self) -> None:
        with self.console.open("ab") as console:
            self.nspawn = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL", "--", "nsenter", f"--net=/run/netns/{self.name}",
                    "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--link-journal=no",
                    f"--machine={self.name}", "--capability=all", "--system-call-filter=@known",
                    "--bind=/sys/fs/cgroup:/run/cgroups", "-D", str(self.root),
                ],
                env={**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1"},
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        pid = self.nspawn.pid
        deadline = time.monotonic() + 60
        while not self.leader:
            if time.monotonic() > deadline or self.nspawn.poll() is not None:
                raise RuntimeError(f"no boot:\n{self.console.read_text(errors='replace')}")
            time.sleep(0.05)
            self.leader = self._systemd_below(pid)
        while "running" not in (state := self.inside("systemctl", "is-system-running", check=False)):
            if time.monotonic() > deadline or "degraded" in state:
                failed = self.inside("systemctl", "--failed", "--no-legend", check=False)
                raise RuntimeError(f"{state}{failed}\n{self.console.read_text(errors='replace')}")
            time.sleep(0.1)
        self._furnish()

    @staticmethod
    def _systemd_below(pid: int) -> int:
        """The child that has become systemd; 0 as long as there is none."""
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
            except OSError:
                continue
        return 0

    def _furnish(self) -> None:
        """Make what nspawn keeps from its machines and a real one has: loop devices, cgroups that can be written to."""
        devices = "mknod /dev/loop-control c 10 237; for n in $(seq 0 %d); do mknod /dev/loop$n b 7 $n; done"
        self.inside("sh", "-c", devices % (LOOP_DEVICES - 1))
        for controller in CONTROLLERS:
            if Path(f"/sys/fs/cgroup/{controller}").is_dir():
                place = f"/sys/fs/cgroup/{controller}"
                self.inside("sh", "-c", f"umount {place} || true; mount --bind /run/cgroups/{controller} {place}")
        self.inside("flynn-host", "init", "--id", "node1", "--external-ip", self.ip)
        arguments = ["--id", "node1", "--external-ip", self.ip, "--vol-provider", "directory"]
        arguments += ["--cgroup-root", self.name]  # the machine outside has a flynn-host of its own, perhaps
        quoted = ", ".join(f'"{argument}"' for argument in arguments)
        (self.config / "host.json").write_text(f'{{"args": [{quoted}]}}')

    def _power_off(self) -> None:
        if self.nspawn is None or self.nspawn.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.leader or self.nspawn.pid, HALT if self.leader else signal.SIGTERM)
        try:
            self.nspawn.wait(40)
        except subprocess.TimeoutExpired:
            os.kill(self.leader or self.nspawn.pid, signal.SIGKILL)
            self.nspawn.wait(20)
        remove_cgroups(self.name)
