"""Deployments: replacing the jobs of one release by those of another. See spec/controller section 5.8."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from flynn.types.codec import Wire
from flynn.types.formation import Processes, Tags


class DeploymentStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class Deployment(Wire):
    id: str = ""
    app: str = ""
    old_release: str = ""
    new_release: str = ""
    strategy: str = ""
    status: str = ""
    processes: Processes | None = None
    tags: Tags | None = None
    deploy_timeout: int = 0  # seconds, for each step
    deploy_batch_size: int | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None
    error: str = ""  # why it failed


class DeploymentEvent(Wire):
    app: str = ""
    deployment: str = ""
    release: str = ""
    status: str = ""
    job_type: str = ""
    job_state: str = ""
    error: str = ""
