"""How many jobs of which type a release is to have. See spec/controller sections 5.5 and 5.6."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.codec import Wire, always, zero_time
from flynn.types.release import Release

Processes = dict[str, int]
Tags = dict[str, dict[str, str]]


class Formation(Wire):
    app: str = ""
    release: str = ""
    processes: Processes | None = None
    tags: Tags | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class ScaleState(StrEnum):
    PENDING = "pending"
    CANCELLED = "cancelled"
    COMPLETE = "complete"


class ScaleRequest(Wire):
    id: str = always("")
    app: str = always("")
    release: str = always("")
    state: str = always("")
    old_processes: Processes | None = None
    new_processes: Processes | None = None
    old_tags: Tags | None = None
    new_tags: Tags | None = None
    created_at: datetime | None = always(None)
    updated_at: datetime | None = always(None)


class ExpandedFormation(Wire):
    """A formation with all that is needed to start its jobs. Without an app it is the stream's "caught up" mark."""

    app: App | None = None
    release: Release | None = None
    artifacts: list[Artifact] = []
    processes: Processes | None = None
    tags: Tags | None = None
    deleted: bool = False
    pending_scale_request: ScaleRequest | None = None
    artifact: Artifact | None = None  # legacy
    updated_at: datetime = zero_time()
