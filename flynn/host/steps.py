"""The steps of a job's start and end at which the host may die: one table, and a way to die at exactly one of them.

Whatever dies, the next daemon finds one of these states and leads it to a truthful end with nothing left over; what
that is for each step and each kind of death stands in docs/recovery-steps.md, which tests walk.

`reach` does nothing at all, unless the environment asks for a fault: FLYNN_HOST_FAULT=<step>:<kind>. Only tests do.
Must not import much: the containers' init is built on it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

FAULT = "FLYNN_HOST_FAULT"
POWER_CUT = "FLYNN_HOST_FAULT_CGROUP"  # for the kind `power`: the cgroup root whose processes die with the daemon

#: name -> what has just happened. In the order of a job's life; the daemon's own start comes first.
STEPS: dict[str, str] = {
    "scratch-formatted": "the daemon makes write layers ready: the file is there, it is not mounted",
    "restored": "the daemon has taken over what ran, and does not listen yet",
    # start
    "recorded": "the job is in the state file, the caller has his answer",
    "waiting": "it waits for network and discoverd",
    "directory": "its directory is made",
    "allocated": "an address is taken from the pool, nothing says so yet",
    "addressed": "the address is recorded",
    "layer-fetched": "a layer's file is here and verified",
    "layer-mounted": "the layer is mounted",
    "scratch-taken": "a write layer is taken from those that are ready",
    "volumes-mounted": "the job's volumes are mounted",
    "identity": "its certificate is written",
    "prepared": "all that the container is built from is there",
    "files": "spec and plan of the container are written",
    "forked": "the container's init is forked",
    "init-listening": "init has its socket",
    "init-cgroups": "init is in its cgroups",
    "init-network": "init has made the veth pair, addresses, routes",
    "init-root": "init has built the root file system",
    "created": "the container stands, the daemon has its descriptors",
    "container-recorded": "the container is recorded",
    "output": "the job's output goes to the log",
    "resumed": "the job's process runs, nobody has recorded it",
    "running": "the job is recorded as running",
    # end
    "stop-asked": "the job was asked to stop, that is recorded",
    "terminated": "SIGTERM is sent",
    "killed": "SIGKILL is sent",
    "ended": "the job has ended, nobody has recorded it",
    "end-recorded": "its end is recorded",
    "output-read": "its output is read to the end",
    "cgroup-removed": "its cgroups are removed",
    "veth-removed": "its network interface is removed",
    "container-removed": "the container's directory is removed",
    "address-released": "its address is free again, and has no rights",
    "layers-released": "layers nobody else uses are unmounted",
    "scratch-unmounted": "the write layer is unmounted, its file is there",
    "scratch-removed": "the write layer is gone",
    "volume-destroyed": "the data of a volume to be deleted with the job is gone, the record is there",
    "volumes-removed": "volumes to be deleted with the job are gone",
    "cleaned": "it is recorded that nothing of the job is left",
}


def _nothing(step: str) -> None:
    """No fault is asked for."""


def _nothing_in_init(step: str, connection: socket.socket) -> None:
    """No fault is asked for."""


def _fail(step: str, kind: str) -> None:
    if kind == "raise":
        raise RuntimeError(f"a fault was asked for at the step {step}")
    if kind == "hang":
        time.sleep(1000)
    if kind == "power":
        _kill_containers(os.environ.get(POWER_CUT, ""))
        _kill_children(os.getpid(), and_theirs=True)  # an init may be in no cgroup yet
    if kind == "zygote":
        _kill_children(os.getpid(), and_theirs=False)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_containers(cgroup_root: str) -> None:
    top = "/sys/fs/cgroup"
    for hierarchy in os.listdir(top):
        for directory, _, files in os.walk(f"{top}/{hierarchy}/{cgroup_root}"):
            if "cgroup.procs" in files:
                with open(f"{directory}/cgroup.procs") as procs:
                    for pid in procs.read().split():
                        _kill(int(pid))


def _kill_children(pid: int, *, and_theirs: bool) -> None:
    """The zygote, and the inits it has forked."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listed:
            children = [int(child) for child in listed.read().split()]
    except OSError:
        return
    for child in children:
        if and_theirs:
            _kill_children(child, and_theirs=True)
        _kill(child)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _armed(fault: str) -> tuple[Callable[[str], None], Callable[[str, socket.socket], None]]:
    wanted, _, kind = fault.partition(":")

    def reach(step: str) -> None:
        if step == wanted:
            _fail(step, kind)

    def reach_in_init(step: str, connection: socket.socket) -> None:
        if step == wanted:
            connection.send(f"fault {step}".encode())
            connection.recv(1)  # until the daemon is gone

    return reach, reach_in_init


reach: Callable[[str], None] = _nothing
"""Say that a step has been done."""

reach_in_init: Callable[[str, socket.socket], None] = _nothing_in_init
"""The same in a container's init, which tells the daemon by its connection."""

SHORTENED = 1.0
if os.environ.get(FAULT):
    reach, reach_in_init = _armed(os.environ[FAULT])
    SHORTENED = 0.1


def patience(seconds: float) -> float:
    """Return a time limit, shortened where faults are asked for: nobody waits 30 seconds in 30 tests."""
    return seconds * SHORTENED
