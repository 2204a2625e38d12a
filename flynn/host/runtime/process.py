"""Starting the job's own process inside the finished container: lookup, identity, limits, exec."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import termios

from flynn.host.runtime import kernel
from flynn.host.runtime.plan import Plan

HIGHEST_DESCRIPTOR = 1 << 20


class CannotStart(Exception):
    """The text goes to the user."""


def find_command(name: str, path: str, cwd: str) -> str:
    """Resolve like a shell: a name with a slash relative to `cwd`, else along `path`, at last in `cwd`.

    Raises CannotStart with the texts users and scripts know.
    """
    if "/" in name:
        full = os.path.join(cwd, name)
        problem = _not_executable(full)
        if problem:
            raise CannotStart(f'exec: "{name}": {problem}')
        return full
    for directory in path.split(":"):
        full = os.path.join(cwd, directory, name)
        if not _not_executable(full):
            return full
    full = os.path.join(cwd, name)
    if name and not _not_executable(full):
        return full
    raise CannotStart(f'exec: "{name}": executable file not found in $PATH')


def _not_executable(path: str) -> str | None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"stat {path}: {_text(error)}"
    if stat.S_ISDIR(mode):
        return "is a directory"
    return None if mode & 0o111 else "permission denied"


def _text(error: OSError) -> str:
    """The wording of Go, which is what users grep for: lower case."""
    return (error.strerror or str(error)).lower()


def spawn(plan: Plan, stdin: int, stdout: int, stderr: int, terminal: bool) -> int:
    """Fork and exec the job's process with these descriptors; return its pid (in the container).

    Returns after the exec. Raises CannotStart when it did not come to that; nothing is left then.
    """
    if not plan.args:
        raise CannotStart("no command given")
    if not os.path.isdir(plan.cwd):
        raise CannotStart(f"chdir {plan.cwd}: no such file or directory")
    command = find_command(plan.args[0], plan.env.get("PATH", ""), plan.cwd)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become(plan, command, (stdin, stdout, stderr), terminal, writer)
        except OSError as error:
            where = error.filename if isinstance(error.filename, str) else command
            os.write(writer, f"{where}: {_text(error)}".encode()[:4000])
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(127)
    os.close(writer)
    try:
        problem = os.read(reader, 4096).decode("utf-8", "replace")
    finally:
        os.close(reader)
    if problem:
        os.waitpid(pid, 0)
        raise CannotStart(problem)
    return pid


def _become(plan: Plan, command: str, stdio: tuple[int, int, int], terminal: bool, report: int) -> None:
    """In the child: take on everything that makes it the job, exec last.

    Of the descriptors only the standard ones and `report` stay: a command or an interpreter named /proc/self/fd/N/...
    must not find init's, which lead to the host.
    """
    os.setsid()
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):  # those libc keeps for itself
                continue
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for target, fd in enumerate(stdio):
        os.dup2(fd, target, inheritable=True)
    if terminal:
        fcntl.ioctl(stdio[1], termios.TIOCSCTTY, 0)
    _write("/proc/self/oom_score_adj", "0")
    if plan.fds is not None:
        _limit(resource.RLIMIT_NOFILE, plan.fds)
    if plan.processes is not None:
        _limit(resource.RLIMIT_NPROC, plan.processes)
    os.umask(0o022)
    os.closerange(3, report)
    os.closerange(report + 1, HIGHEST_DESCRIPTOR)  # one close_range() call
    _enter(plan.cwd)
    _drop_privileges(plan)
    try:
        os.execve(command, plan.args, plan.env)
    except OSError as error:
        if error.errno == errno.ENOENT:  # it was there a moment ago: the interpreter in its first line is missing
            raise OSError(error.errno, "no such file or directory (or its interpreter)", f"exec {command}") from None
        raise OSError(error.errno, error.strerror, f"exec {command}") from None


def _drop_privileges(plan: Plan) -> None:
    if plan.no_new_privileges:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    elif plan.seccomp:
        kernel.install_seccomp(plan.seccomp)  # needs SYS_ADMIN, which is about to go
    kernel.drop_bounding(plan.capabilities)
    if plan.gid is not None or plan.uid is not None:
        gid = plan.gid if plan.gid is not None else 0
        os.setgroups([gid])
        os.setresgid(gid, gid, gid)
    if plan.uid is not None and plan.uid != 0:
        kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
        os.setresuid(plan.uid, plan.uid, plan.uid)
    kernel.set_capabilities(plan.capabilities, ambient=True)
    if plan.no_new_privileges and plan.seccomp:
        kernel.install_seccomp(plan.seccomp)


def _enter(directory: str) -> None:
    """Change directory, but not to one outside the root, where a link to /proc/1/fd/N could lead."""
    os.chdir(directory)
    try:
        os.getcwd()  # fails with ENOENT when the kernel says "(unreachable)"
    except OSError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), f"chdir {directory}") from None


def _limit(kind: int, wanted: tuple[int, int]) -> None:
    """Where the machine does not allow to raise the hard limit, stay at the one there is."""
    try:
        resource.setrlimit(kind, wanted)
    except ValueError:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (min(wanted[0], hard), min(wanted[1], hard)))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
