"""Formations and the scale requests that change them.

A formation says how many jobs of which type are wanted; a scale request is one change of it, which the scheduler
answers by setting it to complete once the jobs are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flynn.controller import validation
from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import given, sought
from flynn.controller.store.apps import COLUMNS as APP_COLUMNS
from flynn.controller.store.apps import app_in
from flynn.controller.store.artifacts import COLUMNS as ARTIFACT_COLUMNS
from flynn.controller.store.releases import COLUMNS as RELEASE_COLUMNS
from flynn.controller.store.releases import TABLES as RELEASE_TABLES
from flynn.controller.store.releases import release_in
from flynn.types.app import App
from flynn.types.codec import ZERO_TIME, Wire
from flynn.types.errors import Conflict, NotFound, ValidationError
from flynn.types.event import EventType
from flynn.types.formation import ExpandedFormation, Formation, Processes, ScaleRequest, ScaleState, Tags
from flynn.types.release import Release

COLUMNS = "app_id AS app, release_id AS release, processes, tags, created_at, updated_at"
SCALE_COLUMNS = (
    "scale_request_id AS id, app_id AS app, release_id AS release, state, old_processes, new_processes,"
    " old_tags, new_tags, created_at, updated_at"
)
EXPANDED = f"""
    SELECT f.processes, f.tags, f.updated_at, f.deleted_at IS NOT NULL AS deleted,
        (SELECT jsonb_strip_nulls(to_jsonb(row)) FROM (
            SELECT {APP_COLUMNS} FROM apps WHERE apps.app_id = f.app_id
        ) row) AS app,
        (SELECT jsonb_strip_nulls(to_jsonb(row)) FROM (
            SELECT {RELEASE_COLUMNS} FROM {RELEASE_TABLES} WHERE r.release_id = f.release_id
        ) row) AS release,
        (SELECT jsonb_agg(jsonb_strip_nulls(to_jsonb(row) - 'index') ORDER BY row.index) FROM (
            SELECT {", ".join("a." + column.strip() for column in ARTIFACT_COLUMNS.split(","))}, ra.index
            FROM release_artifacts ra JOIN artifacts a USING (artifact_id)
            WHERE ra.release_id = f.release_id AND ra.deleted_at IS NULL
        ) row) AS artifacts,
        (SELECT jsonb_strip_nulls(to_jsonb(row)) FROM (
            SELECT {SCALE_COLUMNS} FROM scale_requests s
            WHERE s.app_id = f.app_id AND s.release_id = f.release_id AND s.state = 'pending'
            ORDER BY s.created_at DESC LIMIT 1
        ) row) AS pending_scale_request
    FROM formations f
"""


class ScaleEvent(Wire):
    """Payload of the legacy `scale` events."""

    prev_processes: Processes | None = None
    processes: Processes | None = None
    release: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """How one release is to be scaled: the types named get these counts and tags, the others keep theirs."""

    release: str
    processes: Processes
    tags: Tags | None = None


class FormationStore:
    """Formations and scale requests in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, app_id: str, release_id: str) -> Formation:
        """Return a live formation. Raises `NotFound`."""
        formation = await formation_in(self._database, app_id, sought("release", release_id))
        if formation is None:
            raise NotFound(f"no formation of release {release_id}")
        return formation

    async def all(self, app_id: str) -> list[Formation]:
        """Return an app's live formations, newest first."""
        return await self._database.all(
            Formation,
            f"SELECT {COLUMNS} FROM formations WHERE app_id = %s AND deleted_at IS NULL ORDER BY created_at DESC",
            (app_id,),
        )

    async def expanded(self, app_id: str, release_id: str, *, deleted: bool = False) -> ExpandedFormation | None:
        """Return a formation with all that starting its jobs takes, or None; with `deleted` also one that is gone."""
        return await self._database.one(
            ExpandedFormation,
            f"{EXPANDED} WHERE f.app_id = %s AND f.release_id = %s AND (%s OR f.deleted_at IS NULL)",
            (app_id, sought("release", release_id), deleted),
        )

    async def active(self) -> list[ExpandedFormation]:
        """Return all formations with at least one process, most recently changed first."""
        return await self._database.all(
            ExpandedFormation,
            f"""
            {EXPANDED} WHERE f.deleted_at IS NULL AND EXISTS (
                SELECT 1 FROM jsonb_each_text(f.processes) AS counts WHERE counts.value::bigint > 0
            ) ORDER BY f.updated_at DESC
            """,
        )

    async def changed_since(self, since: datetime) -> list[ExpandedFormation]:
        """Return the live formations changed at or after a time, most recently changed first."""
        return await self._database.all(
            ExpandedFormation,
            f"{EXPANDED} WHERE f.deleted_at IS NULL AND f.updated_at >= %s ORDER BY f.updated_at DESC",
            (max(since, EARLIEST),),
        )

    async def scale(
        self, app_ref: str, release_id: str, processes: Processes | None, tags: Tags | None, *, deployable: bool = False
    ) -> ScaleRequest:
        """Merge the given types into a formation and record that as a pending scale request."""
        if processes is None and tags is None:
            raise ValidationError("", "scale request must have either processes or tags set")
        validation.counts(processes)
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref, lock=True)
            release = await _scaled_release(transaction, release_id)
            if deployable and not release.artifacts:
                raise ValidationError("", "release is not deployable")
            await _keep_critical(transaction, app, release_id, processes or {})
            return await scale_in(transaction, app, release, processes, tags)

    async def change(self, app_ref: str, changes: Sequence[Change]) -> list[ScaleRequest]:
        """Scale several releases of an app as one decision, for the worker: it may pass through having nothing."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref, lock=True)
            return [
                await scale_in(
                    transaction, app, await _scaled_release(transaction, change.release), change.processes, change.tags
                )
                for change in changes
            ]

    async def put(self, app_ref: str, release_id: str, processes: Processes | None, tags: Tags | None) -> Formation:
        """Scale as `PUT formations` does: no processes at all means every type of the release at zero."""
        if processes is None:
            processes = dict.fromkeys((await self._release(release_id)).processes, 0)
        request = await self.scale(app_ref, release_id, processes, tags, deployable=True)
        return Formation(
            app=request.app,
            release=request.release,
            processes=processes,
            tags=tags,
            created_at=request.created_at,
            updated_at=request.updated_at,
        )

    async def _release(self, release_id: str) -> Release:
        release = await release_in(self._database, sought("release", release_id))
        if release is None:
            raise NotFound(f"release {release_id} not found")
        return release

    async def set_scale_state(self, request: ScaleRequest) -> ScaleRequest:
        """Set the state of a pending scale request; the scheduler's answer. One that is over stays as it is."""
        request_id = given("id", request.id)
        async with self._database.transaction() as transaction:
            updated = await transaction.one(
                ScaleRequest,
                "UPDATE scale_requests SET state = %s, updated_at = now()"
                f" WHERE scale_request_id = %s AND state = 'pending' RETURNING {SCALE_COLUMNS}",
                (request.state, request_id),
            )
            if updated is not None:
                transaction.emit(EventType.SCALE_REQUEST, updated.id, updated, app=updated.app, op="update")
                return updated
        over = await self.scale_request(request_id)
        if over is None:
            raise NotFound(f"scale request {request.id} not found")
        return over

    async def scale_request(self, request_id: str) -> ScaleRequest | None:
        """Return one scale request."""
        return await self._database.one(
            ScaleRequest, f"SELECT {SCALE_COLUMNS} FROM scale_requests WHERE scale_request_id = %s", (request_id,)
        )

    async def delete(self, app_ref: str, release_id: str) -> ScaleRequest:
        """Scale a release to nothing and forget its formation. Raises `NotFound`."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref, lock=True)
            release = sought("release", release_id)
            current = await formation_in(transaction, app.id, release)
            await _keep_critical(transaction, app, release, dict.fromkeys((current and current.processes) or {}, 0))
            return await delete_formation_in(transaction, app, release)


EARLIEST = ZERO_TIME.replace(year=1970)  # PostgreSQL and Python disagree about the calendar of the first year


async def formation_in(transaction: Transaction | Database, app_id: str, release_id: str) -> Formation | None:
    """Return a live formation, or None."""
    return await transaction.one(
        Formation,
        f"SELECT {COLUMNS} FROM formations WHERE app_id = %s AND release_id = %s AND deleted_at IS NULL",
        (app_id, release_id),
    )


async def scale_in(
    transaction: Transaction, app: App, release: Release, processes: Processes | None, tags: Tags | None
) -> ScaleRequest:
    """Scale a release of an app whose row is locked."""
    validation.types_of_release({*(processes or {}), *(tags or {})}, release)
    current = await formation_in(transaction, app.id, release.id) or Formation(app=app.id, release=release.id)
    old_processes, old_tags = current.processes or {}, current.tags or {}
    request = ScaleRequest(
        app=app.id,
        release=release.id,
        state=ScaleState.PENDING,
        old_processes=old_processes,
        new_processes=old_processes if processes is None else processes,
        old_tags=old_tags,
        new_tags=old_tags if tags is None else tags,
    )
    request = await _record_request(transaction, request)
    merged = {**old_processes, **(processes or {})}
    await transaction.execute(
        """
        INSERT INTO formations (app_id, release_id, processes, tags) VALUES (%s, %s, %s, %s)
        ON CONFLICT (app_id, release_id) DO UPDATE SET
            processes = EXCLUDED.processes, tags = EXCLUDED.tags, updated_at = now(), deleted_at = NULL
        """,
        (app.id, release.id, jsonb(merged), jsonb({**old_tags, **(tags or {})})),
    )
    _emit_scale(transaction, request, old_processes, merged)
    return request


async def delete_formation_in(transaction: Transaction, app: App, release_id: str) -> ScaleRequest:
    """Scale every type to zero and forget the formation, for an app whose row is locked. Raises `NotFound`."""
    current = await formation_in(transaction, app.id, release_id)
    if current is None:
        raise NotFound(f"no formation of release {release_id}")
    old_processes = current.processes or {}
    request = await _record_request(
        transaction,
        ScaleRequest(
            app=app.id,
            release=release_id,
            state=ScaleState.PENDING,
            old_processes=old_processes,
            new_processes=dict.fromkeys(old_processes, 0),
            old_tags=current.tags or {},
            new_tags=current.tags or {},
        ),
    )
    await transaction.execute(
        "UPDATE formations SET processes = NULL, deleted_at = now(), updated_at = now()"
        " WHERE app_id = %s AND release_id = %s",
        (app.id, release_id),
    )
    _emit_scale(transaction, request, old_processes, request.new_processes)
    return request


async def _keep_critical(transaction: Transaction, app: App, release_id: str, processes: Processes) -> None:
    """Raise `Conflict` if nothing would be left of something that the platform cannot be without."""
    if not app.critical:
        return
    formations = await transaction.all(
        Formation, f"SELECT {COLUMNS} FROM formations WHERE app_id = %s AND deleted_at IS NULL", (app.id,)
    )
    counts = {formation.release: formation.processes or {} for formation in formations}
    others = [running for release, running in counts.items() if release != release_id]
    for name, count in processes.items():
        stops = count == 0 and counts.get(release_id, {}).get(name, 0) > 0
        if stops and not any(running.get(name, 0) for running in others):
            raise Conflict(f"refusing to scale {name} of {app.name} to nothing: the platform cannot be without it")


def _emit_scale(transaction: Transaction, request: ScaleRequest, old: Processes, new: Processes | None) -> None:
    legacy = ScaleEvent(prev_processes=old or None, processes=new, release=request.release)
    transaction.emit(EventType.SCALE, f"{request.app}:{request.release}", legacy, app=request.app)


async def _scaled_release(transaction: Transaction, release_id: str) -> Release:
    release = await release_in(transaction, sought("release", release_id))
    if release is None:
        raise NotFound(f"release {release_id} not found")
    return release


async def _record_request(transaction: Transaction, request: ScaleRequest) -> ScaleRequest:
    cancelled = await transaction.all(
        ScaleRequest,
        "UPDATE scale_requests SET state = 'cancelled', updated_at = now()"
        f" WHERE app_id = %s AND release_id = %s AND state = 'pending' RETURNING {SCALE_COLUMNS}",
        (request.app, request.release),
    )
    created = await transaction.one(
        ScaleRequest,
        "INSERT INTO scale_requests"
        " (app_id, release_id, state, old_processes, new_processes, old_tags, new_tags)"
        f" VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING {SCALE_COLUMNS}",
        (
            request.app,
            request.release,
            request.state,
            jsonb(request.old_processes or None),
            jsonb(request.new_processes),
            jsonb(request.old_tags or None),
            jsonb(request.new_tags),
        ),
    )
    assert created is not None
    for superseded in cancelled:
        # The second kind is what the original's clients look at; they never see the first.
        transaction.emit(EventType.SCALE_REQUEST_CANCELATION, superseded.id, superseded, app=request.app, op="update")
        transaction.emit(EventType.SCALE_REQUEST, superseded.id, superseded, app=request.app, op="update")
    transaction.emit(EventType.SCALE_REQUEST, created.id, created, app=request.app, op="create")
    return created
