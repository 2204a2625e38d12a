"""Where the router keeps its files: what HAProxy reads, and the sockets through which it is spoken to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIG = "haproxy.cfg"


@dataclass(frozen=True, slots=True)
class Paths:
    state: Path  # survives restarts
    run: Path  # sockets

    @property
    def live(self) -> Path:
        """What HAProxy was started with, kept true to what it runs."""
        return self.state / "live"

    @property
    def candidate(self) -> Path:
        """What is being validated."""
        return self.state / "candidate"

    @property
    def config(self) -> Path:
        return self.live / CONFIG

    @property
    def known(self) -> Path:
        """Routes and backends as last heard."""
        return self.state / "known.json"

    @property
    def admin(self) -> Path:
        return self.run / "admin.sock"

    @property
    def master(self) -> Path:
        return self.run / "master.sock"

    @property
    def log(self) -> Path:
        return self.run / "log.sock"

    def create(self) -> None:
        for directory in (self.state, self.run, self.live):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
