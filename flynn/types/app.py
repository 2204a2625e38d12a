"""Apps. See spec/controller section 5.1."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from flynn.types.codec import Wire, always

SYSTEM_APP = "flynn-system-app"
SYSTEM_CRITICAL = "flynn-system-critical"
VOLUME_SCOPE = "flynn-volume-scope"  # "app": a new release takes over the volumes of the one before; "release": not

HANDS_OVER = "flynn-hands-over"  # in the metadata of a job: it gives its volumes to a successor that runs already


class Strategy(StrEnum):
    ALL_AT_ONCE = "all-at-once"
    ONE_BY_ONE = "one-by-one"
    ONE_DOWN_ONE_UP = "one-down-one-up"
    IN_BATCHES = "in-batches"
    SIRENIA = "sirenia"
    DISCOVERD_META = "discoverd-meta"


class App(Wire):
    id: str = ""
    name: str = ""
    meta: dict[str, str] = always({})
    strategy: str = ""
    release: str = ""  # the current one
    deploy_timeout: int = 0  # seconds
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def system(self) -> bool:
        return self.meta.get(SYSTEM_APP) == "true"

    @property
    def critical(self) -> bool:
        return self.meta.get(SYSTEM_CRITICAL) == "true"

    @property
    def keeps_volumes(self) -> bool:
        """Whether its volumes outlive a release. As in the original they do not, except for the platform's own apps."""
        return self.meta.get(VOLUME_SCOPE, "app" if self.system else "release") == "app"
