"""Updating the daemon in place: another program takes this process over, PID and all, and the jobs do not notice.

    asked -> on trial -> making way -> exec -> starting -> ready
                |                                  |
                +-- refused: nothing happened      +-- failed, or not ready in time: exec of the program before

On trial the new program, as a child, reads what it will have to live with (configuration, keys, state, containers)
and says that it is ready. Only then does this daemon leave, as at its end, and lets the new program have the process
and the listening sockets. Should that one not come up after all, it executes the old program again. ADR 8 has the
reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flynn.aio.clock import Clock
from flynn.host import steps
from flynn.host.handover import Handover, Listeners
from flynn.types.codec import Wire, always, decode, replace
from flynn.types.errors import ApiError, Conflict, PreconditionFailed, ValidationError
from flynn.types.host import HostCommand, HostUpdate

log = logging.getLogger(__name__)

TRIAL = "FLYNN_HOST_TRIAL"  # the descriptor a program on trial answers on
TRIAL_SECONDS = 30.0  # for being ready; two are usual, most of it imports
START_SECONDS = 90.0  # for the real start, which also reconnects to every container; systemd allows twice that
LEAVE_SECONDS = 35.0  # for making way; the orderly exit has 20 of them
DELAY_SECONDS = 0.2  # between the answer to who asked and the end of his connection
WORDS_BYTES = 4000  # of what a failed program has said


class Proof(Wire):
    """The answer of a program on trial."""

    version: str = always("")


class Update:
    """This daemon's place in the succession of programs. One per process, made before anything else."""

    def __init__(
        self,
        called: str,
        args: Sequence[str],
        environment: Mapping[str, str],
        handover: Handover,
        *,
        final_environment: Callable[[Mapping[str, str]], dict[str, str]],
        start_seconds: float = START_SECONDS,
    ) -> None:
        """
        Args:
            called: the path of the program as it was called; a link is followed now, for it may change.
            args: of the program, beginning with "daemon".
            environment: as this process was given it, before configuration was added.
            final_environment: adds what has been taken out of it (where systemd listens).
        """
        self._called, self._program = called, [os.path.realpath(called), *args]
        self._environment, self._handover = dict(environment), handover
        self._final_environment, self._start_seconds = final_environment, steps.patience(start_seconds)
        self._next: list[str] = []
        self._pending: HostUpdate | None = None
        self._ready = False
        self._busy = False
        self.making_way = asyncio.Event()
        self.listeners = Listeners(handover.listeners)
        self.last = handover.update  # the last update there was, for the status

    @property
    def inherited(self) -> bool:
        """This program took the process over from another one."""
        return self.last is not None

    # Asking

    async def ask(self, command: HostCommand, flags: Sequence[str], clock: Clock) -> HostCommand:
        """Try the program and, if it proves itself, make way for it a moment after this returns.

        Without a path it is the program that was called, as it is installed now; without arguments `flags` are kept.

        Raises:
            ValidationError: no program, or not this daemon's arguments.
            Conflict: an update is going on.
            PreconditionFailed: the new program does not prove itself; its words are in the message.
        """
        path, args = command.path or self._called, command.args or ["daemon", *flags]
        if "\0" in path or not os.path.isabs(path) or not os.access(path, os.X_OK) or not os.path.isfile(path):
            raise ValidationError("path", f"must be the absolute path of a program, not {path!r}")
        if args[:1] != ["daemon"]:
            raise ValidationError("args", 'must begin with "daemon"')
        if any("\0" in argument for argument in args):
            raise ValidationError("args", "contain a NUL")
        if self._busy:
            raise Conflict("an update is going on")
        self._busy = True
        update = HostUpdate(path=path, at=clock.now())
        try:
            proof = await _try([path, *args], self._environment, steps.patience(TRIAL_SECONDS))
        except PreconditionFailed as error:
            self._busy, self.last = False, replace(update, error=error.message)
            log.warning("the new program is not used", extra={"path": path, "reason": error.message})
            raise
        except BaseException:
            self._busy = False
            raise
        log.info("update", extra={"path": path, "version": proof.version})
        self._next, self._pending = [path, *args], update
        delay = command.shutdown_delay / 1e9 if command.shutdown_delay else DELAY_SECONDS
        asyncio.get_running_loop().call_later(delay, self._make_way)
        return replace(command, path=path, args=args, pid=os.getpid())

    def _make_way(self) -> None:
        # An orderly exit that hangs (a thread, a library) must not keep the new program out.
        _in_time(LEAVE_SECONDS, self.become)
        self.making_way.set()

    # Becoming

    @property
    def asked(self) -> bool:
        return bool(self._next)

    def become(self) -> NoReturn:
        """Execute the new program in this process. Jobs, listening sockets and the PID stay."""
        listeners = self.listeners.hand_over()
        handover = Handover(
            listeners=listeners, back=self._program, environment=self._environment, update=self._pending
        )
        self._execute(self._next, self._environment, handover)

    def _execute(self, program: list[str], environment: Mapping[str, str], handover: Handover) -> NoReturn:
        try:
            os.execve(program[0], program, self._final_environment(handover.into(environment)))
        except OSError as error:  # it was there when it was tried; without `back` the end is systemd's affair
            if not handover.back:
                raise
            failed = handover.update and replace(handover.update, error=f"{program[0]}: {error.strerror}")
            back = Handover(listeners=handover.listeners, update=failed)
            self._execute(handover.back, handover.environment, back)

    # Having become

    def watch_the_start(self) -> None:
        """Go back when this program is not ready in time, however it hangs."""
        if self._handover.back:
            _in_time(
                self._start_seconds, lambda: self.go_back(f"it was not ready within {self._start_seconds:.0f} seconds")
            )

    def go_back(self, reason: str) -> None:
        """Execute the program before this one, unless this one has become ready; return if there is no way back."""
        if self._ready or not self._handover.back:
            return
        log.error("back to the program before", extra={"path": self._handover.back[0], "reason": reason})
        for descriptor in self._handover.listeners.values():
            with contextlib.suppress(OSError):
                os.set_inheritable(descriptor, True)
        failed = self.last and replace(self.last, error=reason)
        back = Handover(listeners=self._handover.listeners, update=failed)
        self._execute(self._handover.back, self._handover.environment, back)

    def ready(self, links: Path) -> None:
        """This program serves: there is no way back any more, and the links to the one before lead here."""
        self._ready = True
        if self._handover.back:
            try:
                move_links(links, Path(self._handover.back[0]).parent, Path(self._program[0]).parent)
            except OSError as error:
                log.error("links not moved", extra={"directory": str(links), "error": str(error)})
        if self.last is not None:
            log.info("updated" if not self.last.error else "not updated", extra={"path": self._program[0]})


def _in_time(seconds: float, act: Callable[[], object]) -> None:
    """Act after some time, unless the process has become another by then; also when the event loop hangs."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


async def _try(program: list[str], environment: Mapping[str, str], seconds: float) -> Proof:
    """Have a program prove itself as a child. Raises `PreconditionFailed`."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        with theirs:
            child = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--", *program),  # must not outlive us
                env={**environment, TRIAL: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        assert child.stderr is not None
        words = asyncio.ensure_future(_last_words(child.stderr))
        try:
            async with asyncio.timeout(seconds):
                answer = await asyncio.get_running_loop().sock_recv(ours, WORDS_BYTES)
                code = await child.wait()
                said = (await words).strip().decode(errors="replace")
        except TimeoutError:
            raise PreconditionFailed(f"{program[0]} was not ready within {seconds:.0f} seconds") from None
        except OSError as error:
            raise PreconditionFailed(f"{program[0]} cannot be tried: {error.strerror}") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            words.cancel()
            await asyncio.gather(child.wait(), words, return_exceptions=True)
    try:
        proof = decode(answer, Proof)
    except ApiError:
        proof = None
    if code != 0 or proof is None:
        raise PreconditionFailed(
            f"{program[0]} ended with {code} instead of being ready" + (f": {said}" if said else "")
        )
    return proof


async def _last_words(stream: asyncio.StreamReader) -> bytes:
    words = b""
    while chunk := await stream.read(WORDS_BYTES):
        words = (words + chunk)[-WORDS_BYTES:]
    return words


def move_links(links: Path, before: Path, now: Path) -> None:
    """Let the links that lead to programs in one directory lead to those in another, one at a time and atomically.

    Others are left alone: an operator's own, or those of another installation. Raises `OSError`.
    """
    if before == now or not links.is_dir():
        return
    for link in links.iterdir():
        target = now / link.name
        if link.is_symlink() and link.resolve() == before / link.name and target.exists():
            beside = links / f".{link.name}.new"
            beside.unlink(missing_ok=True)
            beside.symlink_to(target)
            beside.rename(link)
    descriptor = os.open(links, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_program(called: str, executable: str) -> str:
    """Return the absolute path of the console script that runs, given `sys.argv[0]` and `sys.executable`."""
    if os.access(called, os.X_OK) and os.path.isfile(called):
        return os.path.abspath(called)
    return str(Path(executable).with_name("flynn-host"))
