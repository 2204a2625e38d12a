"""Deployments: the record of replacing one release by another. The worker does what is recorded here."""

from __future__ import annotations

from psycopg import errors

from flynn.controller.database import Database, Transaction, jsonb
from flynn.controller.ids import given, is_uuid, new_id, sought
from flynn.controller.store.apps import app_in, set_release_in
from flynn.controller.store.formations import formation_in
from flynn.controller.store.queue import JobClass, enqueue
from flynn.controller.store.releases import release_in
from flynn.controller.wire import GarbageCollected
from flynn.types.app import App
from flynn.types.deployment import Deployment, DeploymentEvent, DeploymentStatus
from flynn.types.errors import NotFound, ValidationError
from flynn.types.event import EventType
from flynn.types.release import Release

COLUMNS = (
    "deployment_id AS id, app_id AS app, old_release_id AS old_release, new_release_id AS new_release, strategy,"
    " status, processes, tags, deploy_timeout, deploy_batch_size, created_at, finished_at, error"
)
BATCH_SIZE_META = "flynn-deploy-batch-size"
IN_PROGRESS = "Cannot create deploy, there is already one in progress for this app."


class DeploymentStore:
    """Deployments in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, app_ref: str, release_id: str) -> Deployment:
        """Record that `release_id` is to replace the current release; with nothing running that is all it takes.

        Raises:
            ValidationError: unknown release, or another deployment of the app is not finished.
        """
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, app_ref, lock=True)
            release = await release_in(transaction, given("id", release_id)) if is_uuid(release_id) else None
            if release is None:
                raise ValidationError("", f"could not find release with ID {release_id}")
            deployment = await self._insert(transaction, await _planned(transaction, app, release))
            if deployment.finished_at is not None:
                await set_release_in(transaction, app, release)
            else:
                await enqueue(transaction, JobClass.DEPLOYMENT, {"ID": deployment.id})
            emit_progress(transaction, deployment, status=deployment.status, op="create")
        return deployment

    async def _insert(self, transaction: Transaction, deployment: Deployment) -> Deployment:
        kind = await _release_type(transaction, deployment)
        try:
            stored = await transaction.one(
                Deployment,
                f"""
                INSERT INTO deployments (deployment_id, app_id, old_release_id, new_release_id, type, strategy, status,
                    processes, tags, deploy_timeout, deploy_batch_size, finished_at)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, CASE WHEN %s THEN now() END)
                RETURNING {COLUMNS}
                """,
                (
                    deployment.id,
                    deployment.app,
                    deployment.old_release or None,
                    deployment.new_release,
                    kind,
                    deployment.strategy,
                    deployment.status,
                    jsonb(deployment.processes),
                    jsonb(deployment.tags),
                    deployment.deploy_timeout,
                    deployment.deploy_batch_size,
                    deployment.status == DeploymentStatus.COMPLETE,
                ),
            )
        except errors.UniqueViolation as error:
            raise ValidationError("", IN_PROGRESS) from error
        assert stored is not None
        return stored

    async def get(self, deployment_id: str) -> Deployment:
        """Return one deployment. Raises `NotFound`."""
        deployment = await self._database.one(
            Deployment,
            f"SELECT {COLUMNS} FROM deployments WHERE deployment_id = %s",
            (sought("deployment", deployment_id),),
        )
        if deployment is None:
            raise NotFound(f"deployment {deployment_id} not found")
        return deployment

    async def all(self, app_id: str) -> list[Deployment]:
        """Return an app's deployments, newest first."""
        return await self._database.all(
            Deployment, f"SELECT {COLUMNS} FROM deployments WHERE app_id = %s ORDER BY created_at DESC", (app_id,)
        )

    async def begin(self, deployment: Deployment) -> None:
        """Tell that a worker is at it; told once, also when the work is taken up again."""
        async with self._database.transaction() as transaction:
            if await transaction.execute(
                "UPDATE deployments SET status = 'running' WHERE deployment_id = %s AND status = 'pending'",
                (deployment.id,),
            ):
                emit_progress(transaction, deployment, status=DeploymentStatus.RUNNING)

    async def step(self, deployment: Deployment, release: str, process_type: str, state: str) -> None:
        """Tell of one job of a release that is starting, up, stopping or down."""
        async with self._database.transaction() as transaction:
            event = DeploymentEvent(
                app=deployment.app,
                deployment=deployment.id,
                release=release,
                status=DeploymentStatus.RUNNING,
                job_type=process_type,
                job_state=state,
            )
            transaction.emit(EventType.DEPLOYMENT, deployment.id, event, app=deployment.app, op="update")

    async def complete(self, deployment: Deployment) -> None:
        """Make the new release the app's current one and close the deployment, as one decision."""
        async with self._database.transaction() as transaction:
            app = await app_in(transaction, deployment.app, lock=True)
            release = await release_in(transaction, deployment.new_release)
            if release is None:
                raise NotFound(f"release {deployment.new_release} not found")
            if app.release != release.id:
                await set_release_in(transaction, app, release)
            if await _close(transaction, deployment, DeploymentStatus.COMPLETE):
                await enqueue(transaction, JobClass.APP_GARBAGE_COLLECTION, GarbageCollected(app_id=app.id))
                emit_progress(transaction, deployment, status=DeploymentStatus.COMPLETE)

    async def condemn(self, deployment: Deployment, reason: str) -> None:
        """Record that it has failed, before it is taken back: whoever goes on with it takes it back, nothing else."""
        await self._database.execute(
            "UPDATE deployments SET error = %s WHERE deployment_id = %s AND finished_at IS NULL",
            (reason, deployment.id),
        )

    async def fail(self, deployment: Deployment, reason: str) -> None:
        """Close the deployment with the reason its user is to read."""
        async with self._database.transaction() as transaction:
            if await _close(transaction, deployment, DeploymentStatus.FAILED, reason):
                emit_progress(transaction, deployment, status=DeploymentStatus.FAILED, error=reason)


async def _close(
    transaction: Transaction, deployment: Deployment, status: DeploymentStatus, error: str | None = None
) -> bool:
    return bool(
        await transaction.execute(
            "UPDATE deployments SET status = %s, error = %s, finished_at = now()"
            " WHERE deployment_id = %s AND finished_at IS NULL",
            (status.value, error, deployment.id),
        )
    )


def emit_progress(
    transaction: Transaction,
    deployment: Deployment,
    *,
    status: str,
    op: str = "update",
    error: str = "",
) -> None:
    """Have a deployment event written with this transaction."""
    event = DeploymentEvent(
        app=deployment.app,
        deployment=deployment.id,
        release=deployment.new_release,
        status=status,
        error=error,
    )
    transaction.emit(EventType.DEPLOYMENT, deployment.id, event, app=deployment.app, op=op)


async def _planned(transaction: Transaction, app: App, release: Release) -> Deployment:
    """Return the deployment of `release` as it stands at its beginning."""
    formation = await formation_in(transaction, app.id, app.release) if app.release else None
    processes = (formation.processes if formation else None) or {}
    idle = not any(processes.values())
    return Deployment(
        id=new_id(),
        app=app.id,
        old_release=app.release,
        new_release=release.id,
        strategy=app.strategy,
        status=DeploymentStatus.COMPLETE if idle else DeploymentStatus.PENDING,
        processes=processes or None,
        tags=(formation.tags if formation else None) or None,
        deploy_timeout=app.deploy_timeout,
        deploy_batch_size=batch_size_of(app),
    )


def batch_size_of(app: App) -> int | None:
    """Return the batch size an app asks for; None if it asks for none or for nonsense."""
    text = app.meta.get(BATCH_SIZE_META, "")
    return int(text) if text.isascii() and text.isdigit() and int(text) >= 1 else None


async def _release_type(transaction: Transaction, deployment: Deployment) -> str:
    new = await release_in(transaction, deployment.new_release)
    old = await release_in(transaction, deployment.old_release) if deployment.old_release else None
    same = (old.artifacts if old else []) == (new.artifacts if new else [])
    return "config" if same else "code"
