"""Resource providers and what they provision: databases, mostly. See spec/controller section 5.9."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Json, Wire


class Provider(Wire):
    id: str = ""
    url: str = ""
    name: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Resource(Wire):
    id: str = ""
    provider: str = ""
    external_id: str = ""
    env: dict[str, str] = {}
    apps: list[str] = []
    created_at: datetime | None = None


class ResourceReq(Wire):
    apps: list[str] = []  # names or ids
    config: Json = None


class Provisioned(Wire):
    """A provider's answer to a provisioning request."""

    id: str
    env: dict[str, str] = {}
