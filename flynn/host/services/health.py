"""When a port counts as up: pure rules over the outcomes of probes.

The first success is believed at once, so that a new job takes traffic without delay; every later change needs
`threshold` equal outcomes in a row.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import timedelta

from flynn.types.codec import as_timedelta
from flynn.types.release import HealthCheck

FIRST_PAUSE = timedelta(milliseconds=12.5)  # until the first success, twice as long each time:
LONGEST_FIRST_PAUSE = timedelta(milliseconds=100)  # most programs listen a moment after they begin
DEFAULT_INTERVAL = timedelta(seconds=2)
DEFAULT_THRESHOLD = 2
DEFAULT_START_TIMEOUT = timedelta(seconds=10)
PROBE_TIMEOUT = timedelta(seconds=2)


class UnknownCheck(Exception):
    """A check of a type other than tcp, http and https."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A health check with its defaults filled in."""

    type: str
    interval: timedelta
    threshold: int
    kill_down: bool
    start_timeout: timedelta
    path: str
    host: str
    match: str
    status: int

    @classmethod
    def of(cls, wire: HealthCheck) -> Check:
        """Raises `UnknownCheck`."""
        kind = wire.type or "tcp"
        if kind not in ("tcp", "http", "https"):
            raise UnknownCheck(f'unknown health check type "{wire.type}"')
        return cls(
            type=kind,
            interval=as_timedelta(wire.interval) if wire.interval > 0 else DEFAULT_INTERVAL,
            threshold=wire.threshold if wire.threshold > 0 else DEFAULT_THRESHOLD,
            kill_down=wire.kill_down,
            start_timeout=as_timedelta(wire.start_timeout) if wire.start_timeout > 0 else DEFAULT_START_TIMEOUT,
            path=wire.path or "/",
            host=wire.host,
            match=wire.match,
            status=wire.status or 200,
        )


class Change(enum.Enum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Health:
    """What is believed about a port, and how many outcomes in a row speak against it."""

    up: bool = False
    ever_up: bool = False
    against: int = 0


def observe(health: Health, success: bool, threshold: int) -> tuple[Health, Change | None]:
    """Take one outcome into account."""
    if success and not health.ever_up:
        return Health(up=True, ever_up=True), Change.UP
    if success == health.up:
        return Health(health.up, health.ever_up), None
    if health.against + 1 < threshold or not health.ever_up:
        return Health(health.up, health.ever_up, health.against + 1), None
    return Health(success, True), Change.UP if success else Change.DOWN


def pause(health: Health, check: Check) -> timedelta:
    """Return how long to wait before the next probe."""
    if health.ever_up:
        return check.interval
    doublings = min(max(health.against - 1, 0), 8)
    return min(FIRST_PAUSE * (1 << doublings), LONGEST_FIRST_PAUSE, check.interval)
