"""The daemon's side of containers: asyncio, no aiohttp, never blocking on a container.

    async with Runtime(state_dir=Path("/var/lib/flynn"), partitions={"system": 4096, "user": 8192}) as runtime:
        container = await runtime.create(spec)      # set up, waits before exec; descriptors are there already
        await container.resume()                    # exec; returns once the job's process runs
        exit = await container.wait()               # Exit(code, signal, oom)
        await container.destroy()                   # idempotent; frees cgroup, veth, descriptors, directory

Leaving the `async with` ends the zygote and closes connections; containers keep running and are found again with
`reconnect(directory)` by the next Runtime.

Errors:
    ContainerError
      StartFailed       create or resume; the text is for the user: exec: "foo": executable file not found in $PATH
      NotRunning        signal, resize ... after the end
      ContainerLost     reconnect: neither init nor an exit status is there (power cut, init killed unseen)
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from flynn.host.runtime.spec import ContainerSpec


class ContainerError(Exception):
    """See the tree in the module docstring."""


class StartFailed(ContainerError):
    pass


class NotRunning(ContainerError):
    pass


class ContainerLost(ContainerError):
    pass


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job ended. `signal` is 0 for an ordinary exit; killed by signal n gives code 128 + n.

    `oom`: the kernel killed at least one process of the container for lack of memory during its life.
    `error` is set when the job's process never ran (code is then 0 and means nothing).
    """

    code: int
    signal: int = 0
    oom: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    memory_bytes: int
    memory_limit_bytes: int | None
    cpu_seconds: float
    processes: int
    oom_kills: int


class State(enum.Enum):
    CREATED = "created"  # set up, waits for resume()
    RUNNING = "running"
    ENDED = "ended"


class Container:
    """One container, alive or ended. All methods may be called by one event loop only.

    Descriptors (`stdout`, `stderr`, `stdin`, `pty`) are raw, non-blocking and owned by this object: `destroy()` and
    `close()` close them, so `os.dup()` what you hand to a transport that closes. None where there is none:
    a tty container has only `pty`; `stdin` only when the spec asks for it. They are valid from `create()` on.
    stdout and stderr can be read to their end after the container has ended (also after `reconnect` to an ended one:
    what nobody had read is kept). A pipe nobody reads blocks the job, never the daemon or init.
    """

    spec: ContainerSpec
    pid: int  # of init, in the daemon's pid namespace; 0 when reconnected to an ended container
    state: State
    stdout: int | None
    stderr: int | None
    stdin: int | None
    pty: int | None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def directory(self) -> Path:
        return Path(self.spec.directory)

    async def resume(self) -> None:
        """Let the job's process start; return once it was exec'd. Idempotent while running.

        Raises StartFailed (command not found, no such working directory ...); the container has then ended and
        `wait()` gives an Exit with the same text in `error`.
        """
        raise NotImplementedError

    async def wait(self) -> Exit:
        """Wait for the end of the job and of everything in its pid namespace. Any number of callers, any time."""
        raise NotImplementedError

    async def signal(self, number: int) -> None:
        """Send a signal to the job's main process. Before `resume` it is kept and delivered right after the start.

        Raises NotRunning after the end.
        """
        raise NotImplementedError

    async def kill(self) -> None:
        """SIGKILL everything in the container's cgroup, init included; `wait()` then gives code 137. Idempotent."""
        raise NotImplementedError

    async def resize(self, rows: int, columns: int) -> None:
        """Set the window size of the pty (the job gets SIGWINCH). Raises NotRunning without a pty."""
        raise NotImplementedError

    async def close_stdin(self) -> None:
        """Close the write end here *and* in init (which keeps one, so that stdin outlives the daemon): EOF for the job."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Read the cgroup's counters (a few small files, about 0.1 ms). Zeros when the cgroup is gone."""
        raise NotImplementedError

    def oom_kills(self) -> AsyncIterator[int]:
        """Yield the total number of OOM kills each time the kernel reports one; ends with the container."""
        raise NotImplementedError

    async def destroy(self) -> None:
        """Kill what still runs, then remove cgroup, veth and the container's directory; close descriptors. Idempotent.

        Not freed here, because not made here: layer mounts, the scratch directory, volumes, the address.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Forget the container without touching it: closes descriptors and the connection only."""
        raise NotImplementedError


class Runtime:
    """The zygote and the containers made by it or taken over.

    state_dir: `<state_dir>/jobs/<id>` is the usual directory of a container, but specs may name any.
    cgroup_root: path of this node's cgroup below each hierarchy's mount point; distinct per node on a shared machine.
    partitions: name -> cpu shares; created at start. A spec naming another partition is refused with StartFailed.
    """

    def __init__(
        self, *, state_dir: Path, cgroup_root: str = "flynn", partitions: Mapping[str, int] | None = None
    ) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Runtime:
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    async def create(self, spec: ContainerSpec) -> Container:
        """Set the container up to the point before exec. On StartFailed nothing is left behind but the directory.

        Takes about 10-30 ms of wall time and hardly any of the event loop's. A dead zygote is replaced first.
        """
        raise NotImplementedError

    async def reconnect(self, directory: Path) -> Container:
        """Take over a container of an earlier daemon: running, still waiting for resume, or ended meanwhile.

        Raises ContainerLost (call `collect_leftovers` without its id to clean up).
        """
        raise NotImplementedError

    async def collect_leftovers(self, known: Collection[str]) -> list[str]:
        """Kill and remove all containers below the cgroup root whose id is not in `known`; return their ids.

        For the start of the daemon: call it with the ids of the reconnected containers. Also removes empty cgroups and
        veth ends of earlier runs. Directories below `<state_dir>/jobs` of unknown ids are left to the caller.
        """
        raise NotImplementedError
