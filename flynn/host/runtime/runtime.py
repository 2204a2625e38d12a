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

import array
import asyncio
import contextlib
import enum
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import flynn
from flynn.host import steps as job_steps
from flynn.host.network import ports
from flynn.host.runtime import init, kernel, netlink, seccomp
from flynn.host.runtime import plan as plans
from flynn.host.runtime import spec as specs
from flynn.host.runtime.cgroups import CgroupTree, Layout, Steps, Usage, find_layout, steps_for
from flynn.host.runtime.spec import ContainerSpec

DEFAULT_PARTITIONS: Mapping[str, int] = {"system": 4096, "background": 4096, "user": 8192}
SET_UP_LIMIT = (
    30.0  # seconds from request to "created"; 20 ms are usual, a loaded machine with a slow disk may need more
)
KILL_LIMIT = 10.0  # seconds for a SIGKILL to take effect
KILLED = 128 + signal.SIGKILL
DESCRIPTORS = ("stdout", "stderr", "stdin", "pty")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_START_ZYGOTE = (
    "import sys; sys.path.append(sys.argv[1]); from flynn.host.runtime import zygote; zygote.main(int(sys.argv[2]))"
)


class ContainerError(Exception):
    """See the tree in the module docstring."""


class StartFailed(ContainerError):
    pass


class NotRunning(ContainerError):
    pass


class ContainerLost(ContainerError):
    pass


class _ZygoteGone(ContainerError):
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


Stats = Usage


class State(enum.Enum):
    CREATED = "created"  # set up, waits for resume()
    RUNNING = "running"
    ENDED = "ended"


def plan_for(spec: ContainerSpec, steps: Steps, machine: str) -> plans.Plan:
    """Work a spec out into what init carries out. Pure; raises ValueError for names nobody knows."""
    network, mknod = spec.network, kernel.capability_mask(("MKNOD",))
    return plans.Plan(
        {
            "directory": spec.directory,
            "args": list(spec.args),
            "env": dict(spec.env),
            "cwd": spec.cwd or "/",
            "hostname": spec.hostname,
            "uid": spec.uid,
            "gid": spec.gid,
            "tty": spec.tty,
            "window": spec.window,
            "stdin": spec.stdin,
            "lower": list(reversed(spec.rootfs.lower)),
            "writable": spec.rootfs.writable,
            "mounts": [(m.target, m.source, m.writable, m.fstype, m.options, m.flags) for m in spec.mounts],
            "network": network
            and (
                ports.port_name(network.address),
                network.bridge,
                ports.mac_address(network.address),
                network.address,
                network.prefix,
                network.gateway,
                network.mtu,
            ),
            "resolv_conf": spec.resolv_conf is not None,
            "hosts": spec.hosts,
            # Where nothing decides about devices a job neither makes device files nor uses its image's.
            "capabilities": kernel.capability_mask(spec.capabilities) & ~(0 if steps.device_rules else mknod),
            "nodev": not steps.device_rules,
            "devices": [
                (device.path, device.type == "b", device.major, device.minor, device.mode, device.uid, device.gid)
                for device in spec.devices_created
                if device.path
            ],
            "cgroup_directories": list(steps.directories),
            "cgroup_values": list(steps.values),
            "cgroup_optional": list(steps.optional),
            "cgroup_devices": steps.device_program,
            "cgroup_joins": list(steps.joins),
            "cgroup_views": list(steps.views),
            "cgroups_writable": spec.writeable_cgroups,
            "oom_counter": steps.oom_counter,
            "oom_control": steps.oom_control,
            "fds": spec.limits.fds,
            "processes": spec.limits.processes,
            "host_pid_namespace": spec.host_pid_namespace,
            "no_new_privileges": spec.no_new_privileges,
            "seccomp": seccomp.program(spec.capabilities, machine) if spec.seccomp else b"",
            "shm_bytes": spec.shm_bytes,
        }
    )


def exit_from(state: str) -> Exit | None:
    """Read init's last words; None for a state that is not the last."""
    match state.split(" "):
        case ["exited", code, number, oom_kills]:
            return Exit(int(code), int(number), oom_kills != "0")
        case ["failed", oom_kills, *text]:
            return Exit(0, 0, oom_kills != "0", " ".join(text))
    return None


class Container:
    """One container, alive or ended. All methods may be called by one event loop only.

    Descriptors (`stdout`, `stderr`, `stdin`, `pty`) are raw, non-blocking and owned by this object: `destroy()` and
    `close()` close them, so `os.dup()` what you hand to a transport that closes. None where there is none:
    a tty container has only `pty`; `stdin` only when the spec asks for it. They are valid from `create()` on.
    stdout and stderr can be read to their end after the container has ended (also after `reconnect` to an ended one:
    what nobody had read is kept). A pty's end reads as EIO. A pipe nobody reads blocks the job, not the daemon or init.
    """

    def __init__(self, spec: ContainerSpec, tree: CgroupTree) -> None:
        """Not for callers: see Runtime.create and Runtime.reconnect."""
        self.spec = spec
        self.pid = 0  # of init, in the daemon's pid namespace; 0 when reconnected to an ended container
        self.state = State.CREATED
        self.protocol = specs.OLDEST_PROTOCOL  # that init speaks; what came later must not be asked of it
        self.stdout: int | None = None
        self.stderr: int | None = None
        self.stdin: int | None = None
        self.pty: int | None = None
        self._tree = tree
        self._connection: socket.socket | None = None
        self._exit: Exit | None = None
        self._greeted = False
        self._oom_kills = 0
        self._changed = asyncio.Event()  # set and replaced at each change, so that any number may wait for the next

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def directory(self) -> Path:
        return Path(self.spec.directory)

    async def resume(self) -> None:
        """Let the job's process start; return once it was exec'd. Idempotent while running.

        Raises StartFailed (command not found, no such working directory ...); the container has then ended and
        `wait()` gives an Exit with the same text in `error`. Raises NotRunning if it had ended before.
        """
        if self._exit is not None:
            raise NotRunning(f"container {self.id} has ended")
        if self.state is State.CREATED:
            self._send("resume")
            await self._until(lambda: self.state is not State.CREATED)
        if self._exit is not None and self._exit.error is not None:
            raise StartFailed(self._exit.error)

    async def wait(self) -> Exit:
        """Wait for the end of the job and of everything in its pid namespace. Any number of callers, any time."""
        await self._until(lambda: self._exit is not None)
        assert self._exit is not None
        return self._exit

    async def signal(self, number: int) -> None:
        """Send a signal to the job's main process. Before `resume` it is kept and delivered right after the start.

        Raises NotRunning after the end.
        """
        if self._exit is not None:
            raise NotRunning(f"container {self.id} has ended")
        self._send(f"signal {number}")

    async def kill(self) -> None:
        """SIGKILL everything in the container's cgroup, init included; `wait()` then gives code 137. Idempotent."""
        await asyncio.to_thread(self._tree.kill, self.spec.partition, self.id)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the window size of the pty (the job gets SIGWINCH). Raises NotRunning without a pty."""
        if self._exit is not None or self.pty is None:
            raise NotRunning(f"container {self.id} has no terminal")
        self._send(f"resize {rows} {columns}")

    async def close_stdin(self) -> None:
        """Close the write end here *and* in init (it keeps one, so that stdin outlives the daemon): EOF for the job."""
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None
        if self._exit is None:
            self._send("close-stdin")

    def stats(self) -> Stats:
        """Read the cgroup's counters (a few small files, about 0.1 ms). Zeros when the cgroup is gone."""
        return self._tree.usage(self.spec.partition, self.id)

    async def oom_kills(self) -> AsyncIterator[int]:
        """Yield the total number of OOM kills each time the kernel reports one; ends with the container."""
        seen = 0
        while True:
            await self._until(lambda seen=seen: self._oom_kills > seen or self._exit is not None)  # type: ignore[misc]
            if self._oom_kills > seen:
                seen = self._oom_kills
                yield seen
            elif self._exit is not None:
                return

    async def destroy(self) -> None:
        """Kill what still runs, then remove cgroup, veth and the container's directory; close descriptors. Idempotent.

        Not freed here, because not made here: layer mounts, the scratch directory, volumes, the address.
        Raises CgroupError when something in the container cannot be killed; the rest is left for the next try.
        """
        if self._exit is None and self._connection is not None:
            await self.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_LIMIT):
                    await self.wait()
        await asyncio.to_thread(_remove_traces, self._tree, self.spec)
        self.close()

    def close(self) -> None:
        """Forget the container without touching it: closes descriptors and the connection only."""
        for name in DESCRIPTORS:
            fd = getattr(self, name)
            if fd is not None:
                os.close(fd)
                setattr(self, name, None)
        self._disconnect()

    # The connection to init

    def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        asyncio.get_running_loop().add_reader(connection.fileno(), self._on_readable)

    def _disconnect(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _send(self, request: str) -> None:
        if self._connection is None:
            raise NotRunning(f"container {self.id} is not connected")
        try:
            self._connection.send(request.encode(), socket.MSG_NOSIGNAL)
        except BrokenPipeError:
            pass  # ended this moment; the end is about to be read
        except OSError as error:
            raise ContainerError(f"container {self.id} does not take requests: {error}") from error

    def _on_readable(self) -> None:
        assert self._connection is not None
        try:
            raw, ancillary, _, _ = self._connection.recvmsg(65536, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            raw, ancillary = b"", []
        if not raw:
            self._on_end(self._last_words())
        elif raw.startswith(b"hello "):
            fds = array.array("i")
            for _, _, data in ancillary:
                fds.frombytes(data)
            self._on_hello(raw.decode(), list(fds))
        else:
            self._on_state(raw.decode("utf-8", "replace"))
        self._notify()

    def _on_hello(self, message: str, fds: list[int]) -> None:
        _, names, state = message.split(" ", 2)
        for name, fd in zip(names.split(",") if names != "-" else (), fds, strict=True):
            if name in DESCRIPTORS:
                setattr(self, name, fd)
            else:  # of an init newer than we are
                os.close(fd)
        self._greeted = True
        self._on_state(state)

    def _on_state(self, state: str) -> None:
        end = exit_from(state)
        if end is not None:
            self._on_end(end)
        elif state == "running":
            self.state = State.RUNNING
        elif state.startswith("oom "):
            self._oom_kills = int(state.split()[1])
        elif state.startswith("fault "):
            job_steps.reach(state.split()[1])
        elif state.startswith("protocol "):
            self.protocol = int(state.split()[1])

    def _on_end(self, end: Exit) -> None:
        self._exit = self._exit or end
        self.state = State.ENDED
        self._disconnect()

    def _last_words(self) -> Exit:
        """Init is gone: by its own account, or killed before it could give one."""
        return _read_exit(self.directory) or Exit(KILLED, signal.SIGKILL, self.stats().oom_kills > 0)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _take_rest(self) -> None:
        """Offer what the job had written and nobody read when it ended, through pipes as if it were alive."""
        for name in ("pty",) if self.spec.tty else ("stdout", "stderr"):
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            setattr(self, name, reader)
            with contextlib.suppress(FileNotFoundError):
                rest = (self.directory / f"{init.REST_PREFIX}{name}").read_bytes()  # as much as a pipe held
                with contextlib.suppress(OSError):
                    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, max(len(rest), init.PIPE_BYTES))
                with contextlib.suppress(BlockingIOError):
                    os.write(writer, rest)
            os.close(writer)


def _read_exit(directory: Path) -> Exit | None:
    try:
        return exit_from((directory / init.EXIT_FILE).read_text(errors="replace"))
    except FileNotFoundError:
        return None


def _remove_traces(tree: CgroupTree, spec: ContainerSpec) -> None:
    tree.remove(spec.partition, spec.id, KILL_LIMIT)
    job_steps.reach("cgroup-removed")
    if spec.network is not None:
        _delete_link(ports.port_name(spec.network.address))
    job_steps.reach("veth-removed")
    shutil.rmtree(spec.directory, ignore_errors=True)
    job_steps.reach("container-removed")


def _delete_link(name: str) -> None:
    """Also waits until the kernel has let go of it, so that its name and address can be used again."""
    link = netlink.Netlink()
    try:
        link.request(netlink.RTM_DELLINK, netlink.link_header() + netlink.name(netlink.IFLA_IFNAME, name))
    except OSError:  # gone with its namespace
        pass
    finally:
        link.close()


class _Zygote:
    """The running zygote process and the channel to it."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._turn = asyncio.Lock()  # one request and its answer at a time

    @classmethod
    async def start(cls) -> _Zygote:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        root = str(Path(flynn.__file__).parent.parent)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _START_ZYGOTE, root, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        zygote = cls(process, ours)
        if await zygote._receive() != b"ready":
            raise ContainerError("the container zygote did not start")
        return zygote

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and self._control.fileno() >= 0

    async def fork(self, directory: str, connection: socket.socket) -> int:
        async with self._turn:
            try:
                socket.send_fds(self._control, [directory.encode()], [connection.fileno()])
                answer = await self._receive()
            except OSError as error:
                self._control.close()
                raise _ZygoteGone(f"the container zygote is gone: {error}") from error
            except BaseException:
                self._control.close()  # a late answer would be taken for that of the next request
                raise
        if not answer:
            self._control.close()
            raise _ZygoteGone("the container zygote is gone")
        if answer.startswith(b"error "):
            raise StartFailed(answer[6:].decode())
        return int(answer)

    async def _receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._control.fileno(), readable.set)
        try:
            async with asyncio.timeout(SET_UP_LIMIT):
                await readable.wait()
        finally:
            loop.remove_reader(self._control.fileno())
        return self._control.recv(4096)

    async def stop(self) -> None:
        self._control.close()
        try:
            async with asyncio.timeout(2):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Runtime:
    """The zygote and the containers made by it or taken over.

    state_dir: `<state_dir>/jobs/<id>` is the usual directory of a container, but specs may name any.
    cgroup_root: path of this node's cgroup below each hierarchy's mount point; distinct per node on a shared machine.
    partitions: name -> cpu shares; created at start. A spec naming another partition is refused with StartFailed.
    layout: which cgroup hierarchies to use; found on this machine unless given.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        cgroup_root: str = "flynn",
        partitions: Mapping[str, int] = DEFAULT_PARTITIONS,
        layout: Layout | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.partitions = dict(partitions)
        self.cgroups = CgroupTree(layout or find_layout(), cgroup_root)
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()  # guards _zygote

    async def __aenter__(self) -> Runtime:
        self.cgroups.prepare(self.partitions)
        self._zygote = await _Zygote.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zygote is not None:
            await self._zygote.stop()

    async def _living_zygote(self) -> _Zygote:
        async with self._starting:
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    await self._zygote.stop()
                self._zygote = await _Zygote.start()
            return self._zygote

    async def _fork(self, directory: str, connection: socket.socket) -> int:
        try:
            return await (await self._living_zygote()).fork(directory, connection)
        except _ZygoteGone:  # died unnoticed since the last start
            return await (await self._living_zygote()).fork(directory, connection)

    async def create(self, spec: ContainerSpec) -> Container:
        """Set the container up to the point before exec. On StartFailed nothing is left behind but the directory.

        Takes about 10-30 ms of wall time and hardly any of the event loop's. A dead zygote is replaced first.
        """
        if not _ID.fullmatch(spec.id):
            raise StartFailed(f"invalid container id: {spec.id!r}")
        if spec.partition not in self.partitions:
            raise StartFailed(f'host: invalid job partition "{spec.partition}"')
        try:
            plan = plan_for(spec, steps_for(spec, self.cgroups.layout, self.cgroups.root), os.uname().machine)
        except ValueError as error:
            raise StartFailed(str(error)) from error
        container = Container(spec, self.cgroups)
        _write_files(spec, plan)
        job_steps.reach("files")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                container.pid = await self._fork(spec.directory, theirs)
            job_steps.reach("forked")
            container._connect(ours)
            async with asyncio.timeout(SET_UP_LIMIT):
                await container._until(lambda: container._greeted or container._exit is not None)
        except BaseException as error:
            if container._connection is None:
                ours.close()
            await self._undo(container)
            if isinstance(error, TimeoutError):
                raise StartFailed(f"container was not set up within {SET_UP_LIMIT:.0f} s") from error
            raise
        if container._exit is not None:
            await self._undo(container)
            raise StartFailed(container._exit.error or "init was killed while it set the container up")
        return container

    async def _undo(self, container: Container) -> None:
        """Take back what a failed start has made; the directory stays for whoever looks into the failure."""
        if container.pid and container._exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(container.pid, signal.SIGKILL)
        container.close()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.cgroups.remove, container.spec.partition, container.id)

    async def reconnect(self, directory: Path) -> Container:
        """Take over a container of an earlier daemon: running, still waiting for resume, or ended meanwhile.

        Raises ContainerLost (call `collect_leftovers` without its id to clean up).
        """
        try:
            spec = specs.from_json((directory / specs.SPEC_FILE).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ContainerLost(f"no readable spec in {directory}: {error}") from error
        container = Container(spec, self.cgroups)
        self.cgroups.thaw(spec.partition, spec.id)
        connection = _dial(directory)
        if connection is not None:
            container.pid = _peer_pid(connection)
            container._connect(connection)
            try:
                async with asyncio.timeout(job_steps.patience(SET_UP_LIMIT)):
                    await container._until(lambda: container._greeted or container._exit is not None)
            except TimeoutError as error:
                container.close()
                raise ContainerError(f"init of container {spec.id} does not answer") from error
        if not container._greeted:
            end = _read_exit(directory)
            if end is None:
                raise ContainerLost(f"container {spec.id} is gone and left no exit status")
            container.pid = 0
            container._exit, container.state = end, State.ENDED
            container._take_rest()
        return container

    async def collect_leftovers(self, known: Collection[str]) -> list[str]:
        """Kill and remove all containers below the cgroup root whose id is not in `known`; return their ids.

        For the start of the daemon: call it with the ids of the reconnected containers. Also removes empty cgroups;
        interfaces go with their namespaces, a moment later. Directories are left to the caller.
        """
        return await asyncio.to_thread(self._collect_leftovers, frozenset(known))

    def _collect_leftovers(self, known: frozenset[str]) -> list[str]:
        found = [(partition, name) for partition, name in self.cgroups.containers() if name not in known]
        for partition, name in found:
            self.cgroups.kill(partition, name)
        for partition, name in found:
            self.cgroups.remove(partition, name)
        return sorted({name for _, name in found})


def _write_files(spec: ContainerSpec, plan: plans.Plan) -> None:
    directory = Path(spec.directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # the environment is secret
    for stale in (init.EXIT_FILE, f"{init.REST_PREFIX}stdout", f"{init.REST_PREFIX}stderr", f"{init.REST_PREFIX}pty"):
        (directory / stale).unlink(missing_ok=True)
    if spec.resolv_conf is not None:
        (directory / "resolv.conf").write_text(spec.resolv_conf)
    (directory / plans.FILE).write_bytes(plans.dumps(plan))
    (directory / specs.SPEC_FILE).write_text(specs.to_json(spec, init.PROTOCOL))


def _dial(directory: Path) -> socket.socket | None:
    """Connect to the init of a directory; None when there is none (any more). The path may be longer than 108 bytes."""
    fd = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"/proc/self/fd/{fd}/{init.SOCKET}")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    finally:
        os.close(fd)
    return connection


def _peer_pid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[:4], sys.byteorder)
