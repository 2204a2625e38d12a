"""The process that has imported everything init needs and forks once per container.

Single-threaded, started by the daemon with one end of a SOCK_SEQPACKET pair, ends when the other end closes. Inits are
its children only until then; nobody waits for them (their end is seen on their own sockets).

    request: the container's directory, and the init's end of its first connection as SCM_RIGHTS
    answer:  the init's pid, or "error TEXT"
"""

from __future__ import annotations

import gc
import os
import signal
import socket

from flynn.host.runtime import init, kernel
from flynn.host.runtime.plan import FILE, load


def main(control_fd: int) -> None:
    kernel.set_process_name("flynn-zygote")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the daemon's terminal; its end of the socket is what counts
    own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    control = socket.socket(fileno=control_fd)
    gc.collect()
    gc.freeze()
    gc.disable()  # it would only dirty pages shared by all inits
    control.send(b"ready")
    while True:
        request, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not request:
            os._exit(0)
        os.set_inheritable(fds[0], False)  # recv_fds does not, and a job holding this could speak for its init
        connection = socket.socket(fileno=fds[0])
        directory = request.decode()
        try:
            pid = _fork(directory, connection, control, own_pid_namespace)
            control.send(str(pid).encode())
        except OSError as error:
            control.send(f"error {error}".encode())
        finally:
            connection.close()


def _fork(directory: str, connection: socket.socket, control: socket.socket, own_pid_namespace: int) -> int:
    shared = load(f"{directory}/{FILE}").host_pid_namespace
    if not shared:
        kernel.unshare(kernel.CLONE_NEWPID)  # takes effect for the next child only
    try:
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                control.close()
                os.close(own_pid_namespace)
                log = os.open(f"{directory}/init.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(log, 2)
                os.close(log)
                init.main(directory, connection)
            finally:
                os._exit(1)
        return pid
    finally:
        if not shared:
            kernel.setns(own_pid_namespace, kernel.CLONE_NEWPID)
