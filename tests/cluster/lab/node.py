"""A node's life: laying it out, switching it on and off, the power cut, running a command inside."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flynn.host.volumes import fuse
from flynn.host.volumes.patience import PatientThreads
from tests.cluster.lab import network
from tests.cluster.lab.layout import BASE, DISK_BYTES, Node
from tests.cluster.lab.network import run

BIN = Path(sys.executable).parent
CPU_SHARES, CPU_WEIGHT = 32 * 1024, 3200  # as much as 32 processes of the machine


def is_mounted(path: Path) -> bool:
    """`os.path.ismount` does not see a directory bound to itself: device and parent's device are the same."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def share_base() -> None:
    """Make the nodes' directory a mount of its own, whose mounts nobody else sees."""
    BASE.mkdir(parents=True, exist_ok=True)
    if not is_mounted(BASE):
        run("mount", "--bind", str(BASE), str(BASE))
    run("mount", "--make-private", str(BASE))


def share_volumes(node: Node) -> None:
    """Let the node see what zfs-fuse mounts for it from outside, and zfs-fuse what the node unmounts.

    A peer group of their own: nothing else a node mounts is seen outside, so that it vanishes with the node.
    """
    node.volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_mounted(node.volumes):
        run("mount", "--rbind", str(node.volumes), str(node.volumes))
        run("mount", "--make-private", str(node.volumes))
    run("mount", "--make-shared", str(node.volumes))


def start_zfs() -> None:
    """ZFS belongs to the machine, as a kernel module would; with zfs-fuse it is one daemon for all nodes."""
    if fuse.needed():
        asyncio.run(fuse.ensure_daemon(PatientThreads()))


def lay_out(node: Node) -> None:
    """Disk, directories and name resolution of a new node."""
    node.root.mkdir(parents=True, exist_ok=True)
    if not is_mounted(node.root):
        _insert_disk(node)
    for directory in (node.state, node.config):
        directory.mkdir(parents=True, exist_ok=True)
    resolvers = [line for line in Path("/etc/resolv.conf").read_text().splitlines() if line.startswith("nameserver")]
    node.resolv_conf.write_text("\n".join(resolvers) + "\n")
    node.hosts_file.write_text(f"127.0.0.1 localhost\n{node.ip} {node.id}\n")


def _insert_disk(node: Node) -> None:
    """A file system of limited size, so that a node can run out of space without the machine doing so."""
    with node.disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    run("mkfs.ext4", "-q", "-F", "-m0", "-E", "lazy_itable_init=1,nodiscard", str(node.disk))
    run("mount", "-o", "loop", str(node.disk), str(node.root))


def found(node: Node) -> None:
    """Make the node the first of a cluster."""
    _enrol(node, "init")


def invite(node: Node, uses: int) -> str:
    """A join token, from a node that is on."""
    command = inside(node, ["flynn-host", "token", "create", "--uses", str(uses), "--ttl", "10m"])
    done = subprocess.run(
        command, env=command_environment(node), capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def join(node: Node, token: str) -> None:
    """Make the node a host of the cluster that the token is from."""
    _enrol(node, "join", token)


def _enrol(node: Node, *command: str) -> None:
    run(
        str(BIN / "flynn-host"), *command, "--state-dir", str(node.state), "--config-dir", str(node.config),
        "--external-ip", node.ip, "--id", node.id,
    )  # fmt: skip


def daemon_command(node: Node) -> list[str]:
    return [
        str(BIN / "flynn-host"), "daemon",
        "--state-dir", str(node.state), "--config-dir", str(node.config), "--log-dir", str(node.root / "log"),
        "--zpool-name", node.pool, "--cgroup-root", node.cgroup,
    ]  # fmt: skip


def switch_on(node: Node) -> None:
    """Start the node's first process; returns at once."""
    share_volumes(node)
    _weigh_like_a_machine(node)
    with node.console.open("ab") as console:
        # The command below runs as the first process of new namespaces; --kill-child ties its life to unshare's.
        process = subprocess.Popen(
            [
                "nsenter", f"--net=/run/netns/{node.namespace}", "--",
                "unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child=KILL",
                "--mount-proc", "--uts", "--ipc", "--",
                sys.executable, str(Path(__file__).with_name("node_init.py")),
                str(node.volumes), str(node.resolv_conf), str(node.hosts_file), *daemon_command(node),
            ],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True, cwd="/",
        )  # fmt: skip
    node.pidfile.write_text(str(process.pid))


def _weigh_like_a_machine(node: Node) -> None:
    """All jobs of a node are one group of the machine's, which would weigh as much as any single process outside."""
    for path, weight in ((f"cpu/{node.cgroup}/cpu.shares", CPU_SHARES), (f"{node.cgroup}/cpu.weight", CPU_WEIGHT)):
        file = Path("/sys/fs/cgroup") / path
        if file.parent.parent.joinpath("cgroup.procs").exists():
            file.parent.mkdir(exist_ok=True)
            if file.exists():
                file.write_text(str(weight))


def outer_pid(node: Node) -> int | None:
    """The process of ours that holds the node, if it is on."""
    try:
        pid = int(node.pidfile.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return pid if b"unshare" in command and state != "Z" else None


def init_pid(node: Node) -> int | None:
    """The node's process 1, as the machine numbers it."""
    pid = outer_pid(node)
    if pid is None:
        return None
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _gone(node: Node, pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass
        if outer_pid(node) is None:
            return True
        time.sleep(0.05)
    return False


def power_cut(node: Node) -> None:
    """Everything in the node ends at once, with no chance to do anything about it, or to tell anybody.

    The link goes first: the kernel, which lives on, would close the connections of what it kills in good order.
    """
    if network.exists(node.link):
        network.cut(node)
    outer, init = outer_pid(node), init_pid(node)
    if init is not None:
        os.kill(init, signal.SIGKILL)
    if outer is not None and not _gone(node, outer, 15):
        os.kill(outer, signal.SIGKILL)
        _gone(node, outer, 15)
    node.pidfile.unlink(missing_ok=True)


def switch_off(node: Node, seconds: float = 60) -> None:
    """An orderly shutdown; after `seconds` the power is cut."""
    outer, init = outer_pid(node), init_pid(node)
    if init is not None and outer is not None:
        os.kill(init, signal.SIGTERM)
        _gone(node, outer, seconds)
    power_cut(node)


def inside(node: Node, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in the node, as if logged in there."""
    init = init_pid(node)
    if init is None:
        raise RuntimeError(f"{node.id} is off")
    return ["nsenter", "-t", str(init), "--net", "--mount", "--pid", "--uts", "--ipc", "--", *command]


def command_environment(node: Node, more: Mapping[str, str] | None = None) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TERM", "LANG") if name in os.environ}
    return {
        **keep,
        "PATH": f"{BIN}:{keep.get('PATH', '')}",
        "FLYNN_STATE_DIR": str(node.state),
        "FLYNN_CONFIG_DIR": str(node.config),
        **(more or {}),
    }


def remove(node: Node) -> None:
    """Switch the node off and take away all it left on the machine. Also right after an aborted start."""
    power_cut(node)
    _end_strays(node)
    _destroy_pool(node.pool)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in sorted((m for m in mounts if f"{m}/".startswith(f"{node.root}/")), reverse=True):
        run("umount", "--lazy", target, check=False)
    network.unplug(node)
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        group = hierarchy / node.cgroup
        for directory in sorted(group.rglob("*/"), reverse=True) if group.is_dir() else []:
            _remove_cgroup(directory)
        if group.is_dir():
            _remove_cgroup(group)
    shutil.rmtree(node.root, ignore_errors=True)
    node.disk.unlink(missing_ok=True)


def _end_strays(node: Node) -> None:
    """A first process of this very node whose pidfile is gone: its directory was removed under it."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if str(node.resolv_conf) in arguments and any(a.endswith("/lab/node_init.py") for a in arguments):
            os.kill(int(process.name), signal.SIGKILL)


def _destroy_pool(pool: str) -> None:
    """A pool is busy for a moment after its last user was killed, and while somebody has copies of its mounts."""
    deadline = time.monotonic() + 60
    while pool in run("zpool", "list", "-H", "-o", "name", check=False).split():
        run("zpool", "destroy", "-f", pool, check=time.monotonic() > deadline)
        time.sleep(0.1)


def _remove_cgroup(directory: Path) -> None:
    deadline = time.monotonic() + 5
    while directory.is_dir():
        try:
            directory.rmdir()
        except OSError:  # Its last processes are still being reaped.
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)


def unshare_base() -> None:
    while is_mounted(BASE):
        run("umount", "--lazy", str(BASE))
    shutil.rmtree(BASE, ignore_errors=True)
