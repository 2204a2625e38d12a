"""Jobs as the controller knows them. See spec/controller section 5.7; `flynn.types.host` has the host's view."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from flynn.types.codec import Wire, always
from flynn.types.resources import Resources


class JobState(StrEnum):
    PENDING = "pending"
    BLOCKED = "blocked"
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"
    DOWN = "down"
    CRASHED = "crashed"  # legacy, means down
    FAILED = "failed"  # legacy, means down


class Job(Wire):
    uuid: str = always("")
    id: str = ""  # cluster id: <host>-<uuid>
    host_id: str = ""
    app: str = ""
    release: str = ""
    type: str = ""  # empty = one-off
    state: str = ""
    args: list[str] = []
    volumes: list[str] = []
    meta: dict[str, str] = {}
    exit_status: int | None = None
    host_error: str | None = None
    run_at: datetime | None = None
    restarts: int | None = None
    reason: str = ""  # what it waits for, or why it was stopped; the original has no such field
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def waits(self) -> bool:
        """Whether it has not been started yet."""
        return self.state in (JobState.PENDING, JobState.BLOCKED)


class NewJob(Wire):
    """A one-off run."""

    release: str = ""
    artifacts: list[str] = []
    release_env: bool = False
    args: list[str] = []
    env: dict[str, str] = {}
    meta: dict[str, str] = {}
    tty: bool = False
    tty_columns: int = 0
    tty_lines: int = 0
    disable_log: bool = False
    resources: Resources = {}
    data: bool = False
    partition: str = ""
    profiles: list[str] = []
    mounts_from: str = ""
