"""Controller events. See spec/controller section 8."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from flynn.types.codec import Json, Wire


class EventType(StrEnum):
    APP = "app"
    APP_DELETION = "app_deletion"
    APP_RELEASE = "app_release"
    APP_GARBAGE_COLLECTION = "app_garbage_collection"
    ARTIFACT = "artifact"
    CLUSTER_BACKUP = "cluster_backup"
    DEPLOYMENT = "deployment"
    DOMAIN_MIGRATION = "domain_migration"
    JOB = "job"
    PROVIDER = "provider"
    RELEASE = "release"
    RELEASE_DELETION = "release_deletion"
    RESOURCE = "resource"
    RESOURCE_DELETION = "resource_deletion"
    RESOURCE_APP_DELETION = "resource_app_deletion"
    ROUTE = "route"
    ROUTE_DELETION = "route_deletion"
    SCALE = "scale"
    SCALE_REQUEST = "scale_request"
    SCALE_REQUEST_CANCELATION = "scale_request_cancelation"
    SINK = "sink"
    SINK_DELETION = "sink_deletion"
    VOLUME = "volume"


class Event(Wire):
    id: int = 0
    app: str = ""
    object_type: str = ""
    object_id: str = ""
    data: Json = None
    created_at: datetime | None = None
