"""The status document every daemon serves at /.well-known/status. See spec/scheduler section 24."""

from __future__ import annotations

from enum import StrEnum

from flynn.types.codec import Json, Wire, always


class Health(StrEnum):
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Status(Wire):
    status: str = always(Health.HEALTHY.value)
    detail: Json = None
    version: str = always("dev")

    @property
    def healthy(self) -> bool:
        return self.status == Health.HEALTHY


class StatusDocument(Wire):
    data: Status
