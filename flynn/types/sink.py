"""Log sinks. See spec/host section 13 and spec/controller section 5.9."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Json, Wire, always


class Sink(Wire):
    id: str = always("")
    kind: str = always("")
    host_managed: bool = False
    config: Json = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class SinkCursor(Wire):
    time: datetime
    seq: int


class SinkInfo(Wire):
    """The form a host takes and keeps."""

    id: str = always("")
    kind: str = always("")
    cursor: SinkCursor | None = None
    config: Json = always(None)
    host_managed: bool = always(False)
