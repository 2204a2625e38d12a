"""Routes and certificates. See spec/controller sections 5.9 and 7.9."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Wire, always, zero_time

APP_PARENT = "controller/apps/"


class Certificate(Wire):
    id: str = ""
    routes: list[str] = []
    cert: str = ""  # PEM, leaf first
    key: str = ""
    created_at: datetime = zero_time()
    updated_at: datetime = zero_time()


class Route(Wire):
    type: str = always("")  # http or tcp
    id: str = ""
    parent_ref: str = ""
    service: str = always("")
    port: int = 0
    leader: bool = always(False)
    created_at: datetime = zero_time()
    updated_at: datetime = zero_time()
    domain: str = ""
    certificate: Certificate | None = None
    tls_cert: str = ""  # legacy input, as is the key
    tls_key: str = ""
    sticky: bool = False
    path: str = ""
    drain_backends: bool = False
    disable_keep_alives: bool = False

    @property
    def app_id(self) -> str:
        return self.parent_ref.removeprefix(APP_PARENT) if self.parent_ref.startswith(APP_PARENT) else ""
