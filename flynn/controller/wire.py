"""Bodies and event payloads that only this API has: what `flynn.types` does not name as a concept of its own."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Wire, always
from flynn.types.provider import Resource
from flynn.types.release import Release
from flynn.types.route import Route


class AppUpdate(Wire):
    """Body of `POST /apps/:id`. None leaves a value alone; an empty `meta` clears it."""

    meta: dict[str, str] | None = None
    strategy: str | None = None
    deploy_timeout: int | None = None


class ReleaseRef(Wire):
    """Names a release in a body; clients send a whole Release, of which only the id counts."""

    id: str = ""


class AppRelease(Wire):
    """Payload of `app_release` events."""

    prev_release: Release | None = None
    release: Release | None = None


class DeletedRelease(Wire):
    """What deleting a release did: nothing but scaling it down while other apps use it."""

    app: str = always("")
    release: str = always("")
    remaining_apps: list[str] | None = always(None)
    deleted_files: list[str] | None = always(None)


class ReleaseDeletion(Wire):
    """Payload of `release_deletion` events."""

    release_deletion: DeletedRelease | None = always(None)
    error: str = always("")


class DeletedApp(Wire):
    """What deleting an app took with it."""

    app: str = always("")
    deleted_routes: list[Route] | None = always(None)
    deleted_resources: list[Resource] | None = always(None)
    deleted_releases: list[Release] | None = always(None)


class AppDeletion(Wire):
    """Payload of `app_deletion` events."""

    app_deletion: DeletedApp | None = always(None)
    error: str = always("")


class GarbageCollected(Wire):
    """Releases that a garbage collection removed."""

    app_id: str = always("")
    deleted_releases: list[str] | None = always(None)


class AppGarbageCollection(Wire):
    """Payload of `app_garbage_collection` events."""

    app_garbage_collection: GarbageCollected | None = always(None)
    error: str = always("")


class TLSCert(Wire):
    """A certificate with its authority and pin, as a domain migration carries it."""

    ca_cert: str = ""
    cert: str = ""
    pin: str = ""
    key: str = ""


class DomainMigration(Wire):
    """A change of the cluster's domain."""

    id: str = always("")
    old_domain: str = always("")
    domain: str = always("")
    old_tls_cert: TLSCert | None = None
    tls_cert: TLSCert | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None


class LogChunk(Wire):
    """One message of the SSE form of an app log."""

    event: str = ""
    data: dict[str, object] | None = None


class LogMessage(Wire):
    """One line of an app's log."""

    host_id: str = ""
    job_id: str = ""
    msg: str = ""
    process_type: str = ""
    source: str = ""
    stream: str = ""
    timestamp: str = always("")
