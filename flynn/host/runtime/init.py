"""PID 1 of a container: builds it, starts the job's process when told to, keeps its descriptors, reports its end.

Forked from the zygote, so all is imported already and nothing may be imported here later. It outlives the daemon:
whoever connects to `init.sock` in the container's directory is greeted with the state and the descriptors.

Messages, one per packet, words separated by a space:

    daemon: resume | signal N | resize ROWS COLUMNS | close-stdin
    init:   protocol N                before anything else
            hello NAMES STATE...      NAMES: the descriptors passed along, joined by commas ("-" for none)
            STATE...                  whenever it changes, being one of
                created | running | exited CODE SIGNAL OOM | failed OOM TEXT
            oom COUNT                 the kernel has killed COUNT processes of this container so far

The last state is also left in the file `exit` before init ends, and with no daemon connected, so is the unread output.

An init is as old as its container; the daemon may be newer or (an update taken back) older. So messages are added,
never changed, and each side ignores those it does not know; a daemon asks nothing of an init whose protocol does not
have it.

    1  as above, without `protocol`: it was not said then
    2  says its protocol
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios

from flynn.host import steps
from flynn.host.runtime import kernel, netlink, process, rootfs
from flynn.host.runtime.plan import FILE, Plan, load

PROTOCOL = 2
PROTOCOLS = (1, 2)  # that a daemon of this version can talk to
SOCKET = "init.sock"
EXIT_FILE = "exit"
REST_PREFIX = "rest."
EXIT_BYTES = 512
PIPE_BYTES = 256 << 10  # the job and the daemon then need not take turns; only what is in it takes memory
ABANDONED_MS = 60_000  # a daemon that died between create and resume is back in seconds, or does not know of this one
OOM_RECHECKS = 10  # v1 announces before it kills; the counter is read again each 100 ms
FORWARDED = ("HUP", "INT", "QUIT", "USR1", "USR2", "TERM", "WINCH", "CONT", "ALRM", "PIPE")


def main(directory: str, connection: socket.socket) -> None:
    """Be the container in `directory`. Does not return."""
    code = 1
    try:
        os.setsid()
        os.umask(0o022)
        kernel.set_process_name("flynn-init")
        init = Init(directory, connection)
        try:
            init.set_up(connection)
        except OSError as error:
            init.end(f"failed 0 {error.filename or 'container'}: {error.strerror}")
        except Exception as error:  # whatever it is, the daemon must hear of it
            init.end(f"failed 0 {type(error).__name__}: {error}")
        else:
            init.greet(connection)
            code = init.serve()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # to init.log
    finally:
        os._exit(code)


class Init:
    def __init__(self, directory: str, connection: socket.socket) -> None:
        self.directory = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)  # kept: paths mean other things after pivot
        self.plan: Plan = load(f"{directory}/{FILE}")
        self.connections: dict[int, socket.socket] = {connection.fileno(): connection}
        self.state = "created"
        self.ours: dict[str, int] = {}  # descriptor name -> the daemon's end, kept for the next daemon
        self.theirs: tuple[int, int, int] = (-1, -1, -1)  # the job's stdin, stdout, stderr until it runs
        self.main = 0
        self.pending: list[int] = []  # signals that came before the process
        self.oom_seen = 0
        self.oom_rechecks = 0

    # Building

    def set_up(self, connection: socket.socket) -> None:
        plan = self.plan
        fd = self._exit_file()  # with its block on the disk before the job can fill that
        os.write(fd, b" " * EXIT_BYTES)
        os.close(fd)
        self.listener = self._listen()
        steps.reach_in_init("init-listening", connection)
        self._join_cgroups()
        steps.reach_in_init("init-cgroups", connection)
        self._watch_memory()
        _protect_from_oom()
        host = netlink.Netlink() if plan.network else None
        bridge = socket.if_nametoindex(plan.network[1]) if plan.network else 0
        kernel.unshare(
            kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | (kernel.CLONE_NEWNET if host else 0)
        )
        if host is not None:
            self._connect_network(host, bridge)
            if plan.hostname:
                kernel.sethostname(plan.hostname[:64])
        steps.reach_in_init("init-network", connection)
        rootfs.build(plan)
        steps.reach_in_init("init-root", connection)
        self._open_stdio()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # /proc/1 is closed to the container's root
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self._take_signals()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = f"/proc/self/fd/{self.directory}/{SOCKET}"  # short, whatever the directory is called
        try:
            os.unlink(SOCKET, dir_fd=self.directory)
        except FileNotFoundError:
            pass
        listener.bind(path)
        listener.listen(4)
        return listener

    def _join_cgroups(self) -> None:
        for directory in self.plan.cgroup_directories:
            os.makedirs(directory, exist_ok=True)
        for path, value in self.plan.cgroup_values:
            _write(path, value)
        for path, value in self.plan.cgroup_optional:
            if os.path.exists(path):
                _write(path, value)
        if self.plan.cgroup_devices:
            kernel.attach_device_program(self.plan.cgroup_directories[0], self.plan.cgroup_devices)
        for path in self.plan.cgroup_joins:
            _write(path, "0")
        self.members = os.open(self.plan.cgroup_joins[0], os.O_RDONLY | os.O_CLOEXEC)

    def _watch_memory(self) -> None:
        if not os.path.exists(self.plan.oom_counter):  # a machine without the memory controller
            self.oom_counter = self.oom_event = _null()
            return
        self.oom_counter = os.open(self.plan.oom_counter, os.O_RDONLY | os.O_CLOEXEC)
        self.oom_event = self.oom_counter
        if self.plan.oom_control:
            self.oom_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            _write(self.plan.oom_control, f"{self.oom_event} {self.oom_counter}")

    def _connect_network(self, host: netlink.Netlink, bridge: int) -> None:
        assert self.plan.network is not None
        outside, _, mac, ip, prefix, gateway, mtu = self.plan.network
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        pair = netlink.veth(outside=outside, bridge=bridge, inside="eth0", inside_namespace=own, mtu=mtu, mac=mac)
        new = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
        try:
            host.request(netlink.RTM_NEWLINK, pair, new, f"create {outside}")
        except FileExistsError:  # of the address's last owner: the kernel takes its time with dead namespaces
            host.request(netlink.RTM_DELLINK, netlink.link_header() + netlink.name(netlink.IFLA_IFNAME, outside))
            host.request(netlink.RTM_NEWLINK, pair, new, f"create {outside}")
        os.close(own)
        host.close()
        inside = netlink.Netlink()
        index = socket.if_nametoindex("eth0")
        inside.request(netlink.RTM_NEWADDR, netlink.address(index, ip, prefix), new, f"address {ip}")
        inside.request(netlink.RTM_NEWLINK, netlink.link_header(1, netlink.IFF_UP), 0, "loopback up")
        inside.request(netlink.RTM_NEWLINK, netlink.link_header(index, netlink.IFF_UP), 0, "eth0 up")
        inside.request(netlink.RTM_NEWROUTE, netlink.default_route(index, gateway), new, f"route via {gateway}")
        inside.close()

    def _open_stdio(self) -> None:
        plan = self.plan
        owner = (plan.uid if plan.uid is not None else -1, plan.gid if plan.gid is not None else -1)
        if plan.tty:
            pty, terminal = os.openpty()
            os.fchown(terminal, *owner)
            self.ours["pty"] = pty
            if plan.window != (0, 0):
                _resize(pty, *plan.window)
            self.theirs = (terminal if plan.stdin else _null(), terminal, terminal)
        else:
            stdout, stderr = os.pipe(), os.pipe()
            self.ours["stdout"], self.ours["stderr"] = stdout[0], stderr[0]
            stdin = _null()
            if plan.stdin:
                stdin, self.ours["stdin"] = os.pipe()
                os.fchown(stdin, *owner)
            for _, writer in (stdout, stderr):  # so that /dev/stdout can be opened again
                os.fchown(writer, *owner)
            for fd in (stdout[1], stderr[1], *([stdin] if plan.stdin else [])):
                _widen(fd)
            self.theirs = (stdin, stdout[1], stderr[1])
        for fd in self.ours.values():
            os.set_blocking(fd, False)

    def _take_signals(self) -> None:
        self.wakeup, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for name in ("CHLD", *FORWARDED):
            signal.signal(getattr(signal, f"SIG{name}"), _noted)

    # Serving

    def serve(self) -> int:
        """Answer until the job has ended (and everything else in the container with it); return the exit code."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self.wakeup, select.POLLIN)
        poll.register(self.oom_event, select.POLLIN if self.oom_event != self.oom_counter else select.POLLPRI)
        for fd in self.connections:
            poll.register(fd, select.POLLIN)
        while True:
            happened = poll.poll(self._patience())
            if not happened and self.state == "created" and not self.connections:
                self.end("failed 0 abandoned by its daemon before it was started")
                return 1
            for fd, _ in happened:
                if fd == self.wakeup:
                    status = self._on_signals(os.read(fd, 1024))
                    if status is not None:
                        return self._finish(status)
                elif fd == self.listener.fileno():
                    connection, _ = self.listener.accept()
                    self.connections[connection.fileno()] = connection
                    poll.register(connection, select.POLLIN)
                    self.greet(connection)
                elif fd == self.oom_event:
                    self._drain_oom_event()
                elif fd in self.connections and not self._on_request(self.connections[fd]):
                    poll.unregister(fd)
                    self.connections.pop(fd).close()
                if self.state.startswith("failed"):
                    self.end(self.state)
                    return 1
            if self.oom_rechecks:
                self.oom_rechecks -= 1
                self._report_oom()

    def _patience(self) -> int | None:
        if self.oom_rechecks:
            return 100
        return ABANDONED_MS if self.state == "created" and not self.connections else None

    def greet(self, connection: socket.socket) -> None:
        names = ",".join(self.ours) or "-"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.ours.values()))] if self.ours else []
        try:
            connection.send(f"protocol {PROTOCOL}".encode(), socket.MSG_NOSIGNAL)
            connection.sendmsg([f"hello {names} {self.state}".encode()], rights, socket.MSG_NOSIGNAL)
        except OSError:
            pass  # gone already: the poll will say so

    def _tell(self, message: str) -> None:
        for connection in self.connections.values():
            try:
                connection.send(message.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                pass  # gone, or too busy to be told; it will see the end of the connection

    def _on_request(self, connection: socket.socket) -> bool:
        """Carry out one request; False when the other side is gone."""
        try:
            words = connection.recv(4096).decode().split()
        except OSError:
            return False
        match words:
            case []:
                return False
            case ["resume"]:
                self._resume()
            case ["signal", number]:
                self._signal(int(number))
            case ["resize", rows, columns] if "pty" in self.ours:
                _resize(self.ours["pty"], int(rows), int(columns))
            case ["close-stdin"] if "stdin" in self.ours:
                os.close(self.ours.pop("stdin"))
        return True

    def _resume(self) -> None:
        if self.state != "created":
            return
        try:
            self.main = process.spawn(self.plan, *self.theirs, terminal=self.plan.tty and self.plan.stdin)
        except process.CannotStart as error:
            self.state = f"failed 0 {error}"
            return
        for fd in set(self.theirs):
            os.close(fd)
        kernel.set_capabilities(kernel.capability_mask(("KILL",)), ambient=False)  # all it needs from here on
        self.state = "running"
        self._tell(self.state)
        for number in self.pending:
            self._signal(number)

    def _signal(self, number: int) -> None:
        if not self.main:
            self.pending.append(number)
            return
        try:
            os.kill(self.main, number)
        except (ProcessLookupError, ValueError, OverflowError):
            pass
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def _on_signals(self, numbers: bytes) -> int | None:
        """Reap and forward; the wait status once the job's process has ended."""
        for number in numbers:
            if number != signal.SIGCHLD:
                self._signal(number)
        ended = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            if pid == self.main:
                ended = status

    # Ending

    def _finish(self, status: int) -> int:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = 128 + number if number else os.WEXITSTATUS(status)
        self._kill_others()
        self._report_oom()
        self.end(f"exited {code} {number} {self.oom_seen}")
        return code

    def _kill_others(self) -> None:
        """Nothing of the container survives its job; so the output pipes have an end."""
        if os.getpid() == 1:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:  # in the host's pid namespace
            for pid in os.pread(self.members, 1 << 20, 0).split():
                if int(pid) != os.getpid():
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except ProcessLookupError:
                        pass
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass

    def end(self, state: str) -> None:
        """Leave the last state where a later daemon finds it, then tell the present one."""
        self.state = state
        if not self.connections:
            self._save_output()
        try:
            fd = self._exit_file()
            os.ftruncate(fd, os.pwrite(fd, state.encode(), 0))
            os.close(fd)
            os.rename(EXIT_FILE + ".new", EXIT_FILE, src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except OSError:
            sys.excepthook(*sys.exc_info())  # a full disk: the daemon, if there is one, is told all the same
        self._tell(state)

    def _exit_file(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        return os.open(EXIT_FILE + ".new", flags, 0o600, dir_fd=self.directory)

    def _save_output(self) -> None:
        """Keep what is still in the pipes: they die with this process."""
        for name, source in self.ours.items():
            if name == "stdin":
                continue
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = os.open(REST_PREFIX + name, flags, 0o600, dir_fd=self.directory)
            try:
                while chunk := os.read(source, 65536):
                    os.write(fd, chunk)
            except OSError as error:  # EIO: a pty whose other side is closed; EAGAIN: a writer not yet dead
                if error.errno not in (errno.EIO, errno.EAGAIN):
                    raise
            finally:
                os.close(fd)

    # Memory

    def _drain_oom_event(self) -> None:
        if self.oom_event != self.oom_counter:
            os.read(self.oom_event, 8)
            self.oom_rechecks = OOM_RECHECKS
        self._report_oom()

    def _report_oom(self) -> None:
        lines = os.pread(self.oom_counter, 4096, 0).decode().splitlines()
        count = next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        if count > self.oom_seen:
            self.oom_seen = count
            self.oom_rechecks = 0
            self._tell(f"oom {count}")


def _noted(number: int, frame: object) -> None:
    """The wake-up descriptor carries the number; a handler must only exist."""


def _protect_from_oom() -> None:
    """The job is to be killed, not its keeper. Where the machine does not allow that (no SYS_RESOURCE): do without."""
    try:
        _write("/proc/self/oom_score_adj", "-1000")
    except PermissionError:
        pass


def _resize(pty: int, rows: int, columns: int) -> None:
    fcntl.ioctl(pty, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


def _widen(pipe: int) -> None:
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # the machine allows less, and a pipe works with any size


def _null() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"write {text} to {path}") from None
    finally:
        os.close(fd)
