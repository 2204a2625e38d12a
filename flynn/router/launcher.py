"""The main process of the router: keeps HAProxy and the control daemon running, and does nothing else.

Traffic depends on HAProxy alone. The control daemon may die at any time and is started again; it finds HAProxy as it
left it. HAProxy is started as soon as there is a configuration, also one that an earlier life left behind, so a router
serves before it has reached the controller. This process imports next to nothing: it has to be small and must not fail.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESTART_SECONDS = 0.5  # grows to the limit while a child keeps dying young
RESTART_LIMIT_SECONDS = 10.0
YOUNG_SECONDS = 10.0
TICK_SECONDS = 0.1
CONTROL_EXIT_SECONDS = 5.0
DRAIN_SECONDS = 18.0  # with the seconds above this stays below the 30 s after which the host kills
EXIT_CONFIG = 78  # the control daemon's way to say that starting it again would not help
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@dataclass(slots=True)
class Child:
    """A process that is to run, with the pause before its next start."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_after: float = 0.0
    pause: float = field(default=RESTART_SECONDS)

    def keep(self, now: float) -> None:
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            self.pause = (
                min(self.pause * 2, RESTART_LIMIT_SECONDS) if now - self.started_at < YOUNG_SECONDS else RESTART_SECONDS
            )
            self.start_after = now + (0 if self.pause == RESTART_SECONDS else self.pause)
            _say(f"{self.name} ended, starting it again", exit_code=code)
        if self.process is None and now >= self.start_after:
            self.process = subprocess.Popen(self.command, preexec_fn=_die_with_parent)
            self.started_at = now

    def signal(self, signum: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def ended_within(self, seconds: float) -> bool:
        if self.process is None:
            return True
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def haproxy_command(config: Path, master_socket: Path, binary: str = "haproxy") -> list[str]:
    return [binary, "-W", "-S", f"{master_socket},mode,600", "-f", str(config)]


def launch(control: Sequence[str], config: Path, master_socket: Path, *, drain_seconds: float) -> int:
    """Run until SIGTERM or SIGINT, then stop in order: leave the directory, finish requests, end."""
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    daemon = Child("control", control)
    proxy = Child("haproxy", haproxy_command(config, master_socket))
    while not stopping:
        now = time.monotonic()
        if daemon.process is not None and daemon.process.poll() == EXIT_CONFIG:
            proxy.signal(signal.SIGTERM)
            return 1
        daemon.keep(now)
        if proxy.process is not None or config.exists():
            proxy.keep(now)
        time.sleep(TICK_SECONDS)

    daemon.signal(signal.SIGTERM)  # deregisters, so that nobody new comes
    if not daemon.ended_within(CONTROL_EXIT_SECONDS):
        daemon.signal(signal.SIGKILL)
    proxy.signal(signal.SIGUSR1)  # stops listening, tells clients to go, ends when the last request has
    if not proxy.ended_within(drain_seconds):
        proxy.signal(signal.SIGTERM)
        if not proxy.ended_within(CONTROL_EXIT_SECONDS):
            proxy.signal(signal.SIGKILL)
    return 0


def _say(message: str, **fields: object) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rest = "".join(f" {key}={value}" for key, value in fields.items())
    print(f't={stamp} lvl=info component=router at=router.launcher msg="{message}"{rest}', flush=True)


def control_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "flynn.router.main", "--control", *arguments]


def run_directory() -> Path:
    return Path(os.environ.get("ROUTER_RUN_DIR") or "/run/flynn-router")
