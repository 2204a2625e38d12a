"""What the service directory knows: instances of services, service metadata, events. See spec/discoverd."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from flynn.types.codec import Json, Wire, always


class LeaderType(StrEnum):
    OLDEST = "oldest"
    MANUAL = "manual"


class EventKind(StrEnum):
    UP = "up"
    UPDATE = "update"
    DOWN = "down"
    LEADER = "leader"
    CURRENT = "current"
    SERVICE_META = "service_meta"


class Instance(Wire):
    """One address of a service. `id` is a function of protocol and address, so a re-registration is an update."""

    id: str = ""
    addr: str
    proto: str
    meta: dict[str, str] = {}
    index: int = 0  # log index of the first registration; 0 on input

    @classmethod
    def at(cls, addr: str, proto: str, meta: dict[str, str] | None = None) -> Instance:
        return cls(id=instance_id(proto, addr), addr=addr, proto=proto, meta=meta or {})

    @property
    def host(self) -> str:
        return self.addr.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.addr.rpartition(":")[2])


def instance_id(proto: str, addr: str) -> str:
    return hashlib.md5(f"{proto}-{addr}".encode(), usedforsecurity=False).hexdigest()


class ServiceConfig(Wire):
    leader_type: str = LeaderType.OLDEST


class ServiceMeta(Wire):
    """Free-form data attached to a service, guarded by compare-and-set."""

    data: Json = always(None)
    index: int = always(0)  # log index of the last write; 0 in a request means "must not exist yet"
    leader_id: str = ""  # applied with the write, never returned by reads


class DiscoverdEvent(Wire):
    service: str
    kind: EventKind
    instance: Instance | None = None
    service_meta: ServiceMeta | None = None
