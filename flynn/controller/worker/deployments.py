"""Carrying out a deployment: ask the strategy for the next step, scale, wait, and again, until nothing is left.

The only state is in the database: the deployment's record and the two formations. A worker that takes over waits for
the scale request that is still pending and goes on from there. spec/controller-worker section 3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta

from flynn.aio.broadcast import Overflowed
from flynn.controller.deploy.peers import Unfit, check_fit
from flynn.controller.deploy.strategies import (
    IN_PLACE,
    TOLERATED_FAILED_STARTS,
    Counts,
    NextStep,
    Progress,
    ScaleNew,
    ScaleOld,
    Step,
    Swap,
    UnsupportedStrategy,
    batch_size,
    database_process,
    failed_start_message,
    sirenia,
    strategy_steps,
)
from flynn.controller.hosts import Hosts
from flynn.controller.store.formations import Change
from flynn.controller.store.queue import QueuedJob
from flynn.controller.stores import Stores
from flynn.controller.worker import rollout
from flynn.controller.worker.databases import DatabaseClusters, NoProgress, PeerReplacement, Seen, patiently
from flynn.discoverd.registry import Registry
from flynn.types.app import Strategy
from flynn.types.codec import convert
from flynn.types.deployment import Deployment
from flynn.types.errors import ApiError, NotFound, ServiceUnavailable, ValidationError
from flynn.types.event import Event, EventType
from flynn.types.formation import Processes, ScaleRequest, ScaleState, Tags
from flynn.types.job import Job, JobState
from flynn.types.release import Release

log = logging.getLogger(__name__)

ROLLBACK_WAIT = timedelta(seconds=10)
MAX_BREAKDOWNS = 5  # of the worker's own; then the deployment fails instead of blocking its app
DATABASE_PAUSE = timedelta(milliseconds=500)
LOOK_AGAIN = timedelta(seconds=10)  # while waiting for a scale request whose event does not come


class DeploymentError(Exception):
    """The deployment cannot succeed; `str()` is what its user reads."""


class DeploymentProcedure:
    """The procedure behind queue jobs of class `deployment`."""

    def __init__(self, stores: Stores, hosts: Hosts, databases: DatabaseClusters, directory: Registry) -> None:
        self._stores = stores
        self._hosts = hosts
        self._databases = databases
        self._directory = directory

    async def __call__(self, job: QueuedJob) -> None:
        """Do a deployment, or what is left of it. What raises is tried again, except that it may not go on for ever."""
        try:
            deployment = await self._stores.deployments.get(str(job.args["ID"]))
        except NotFound:
            return None
        if deployment.finished_at is not None:
            return None
        if deployment.error:  # an earlier attempt came to this verdict and was interrupted while taking it back
            return await self._give_up(deployment, deployment.error)
        try:
            await self._perform(deployment)
        except (DeploymentError, UnsupportedStrategy, NoProgress, Unfit) as error:
            await self._give_up(deployment, str(error))
        except (NotFound, ValidationError) as error:
            await self._give_up(deployment, error.message)
        except Exception as error:  # Not a verdict about the deployment, but it must not block its app for ever either.
            if job.error_count + 1 < MAX_BREAKDOWNS:
                raise
            log.exception("deployment broke down too often", extra={"deployment": deployment.id})
            await self._give_up(deployment, f"the deployment broke down: {error}")

    async def _perform(self, deployment: Deployment) -> None:
        await self._stores.deployments.begin(deployment)
        if deployment.old_release != deployment.new_release:
            new = await self._stores.releases.get(deployment.new_release)
            batch = await self._batch(deployment)
            steps = await self._steps(deployment, new)
            await self._settle(deployment, new)
            if deployment.strategy == Strategy.DISCOVERD_META:
                await rollout.begin(self._directory, deployment.id, new.id)
            if (database := await self._cluster_of_several(deployment)) is not None:
                await self._replace_peers(deployment, new, database)
            while (step := steps(await self._progress(deployment, new, batch))) is not None:
                await self._scale(deployment, new, step)
        await self._stores.deployments.complete(deployment)

    async def _steps(self, deployment: Deployment, new: Release) -> NextStep:
        if deployment.strategy != Strategy.SIRENIA:
            return strategy_steps(deployment.strategy)
        database = await self._database_of(deployment)
        return sirenia(await self._progress(deployment, new, 1), database)

    async def _database_of(self, deployment: Deployment) -> str:
        new = await self._stores.releases.get(deployment.new_release)
        old = await self._stores.releases.get(deployment.old_release) if deployment.old_release else Release()
        return database_process(old.env, new.env)

    async def _cluster_of_several(self, deployment: Deployment) -> str | None:
        """Return the process type whose jobs are peers of one database cluster, if there is such a thing here."""
        if deployment.strategy != Strategy.SIRENIA:
            return None
        database = await self._database_of(deployment)
        return database if (deployment.processes or {}).get(database, 0) > 1 else None

    async def _replace_peers(self, deployment: Deployment, new: Release, database: str) -> None:
        """Bring all peers of a database cluster to the new release, and stop what is left of the others' jobs."""

        async def expected(seen: Seen) -> int:
            return (await patiently(lambda: self._counts(deployment.app, new.id))).get(database, 0)

        async def start(seen: Seen) -> None:
            await told(new.id, "starting")
            await self._scale(deployment, new, ScaleNew({database: await expected(seen) + 1}))
            await told(new.id, "up")

        async def told(release: str, state: str) -> None:
            await patiently(lambda: self._stores.deployments.step(deployment, release, database, state))

        if not new.processes[database].service:
            raise Unfit("sirenia process type has no service")
        replacement = self._replacement(deployment, new, database, expected, start, told)
        if not await expected(Seen(None)):
            check_fit((await self._databases.look(replacement.service)).state)
        await replacement.run()
        # Their databases have been stopped, their containers have not. A deployment that failed may have left some too.
        for formation in await patiently(lambda: self._stores.formations.all(deployment.app)):
            left = (formation.processes or {}).get(database, 0)
            if left and formation.release not in (new.id, deployment.old_release):
                await self._stores.formations.change(deployment.app, [Change(formation.release, {database: 0})])

    def _replacement(
        self,
        deployment: Deployment,
        release: Release,
        database: str,
        expected: Callable[[Seen], Awaitable[int]],
        start: Callable[[Seen], Awaitable[None]],
        told: Callable[[str, str], Awaitable[None]],
    ) -> PeerReplacement:
        return PeerReplacement(
            clusters=self._databases,
            service=release.processes[database].service,
            release=release.id,
            wanted=(deployment.processes or {}).get(database, 0),
            limit=timedelta(seconds=deployment.deploy_timeout),
            expected=expected,
            start=start,
            told=told,
        )

    async def _bring_peers_back(self, deployment: Deployment, database: str) -> None:
        """Bring all peers of a database cluster back to the old release. Raises NoProgress, DeploymentError.

        The data may have moved on to the new peers by now: they are replaced as carefully as the old ones were. Jobs
        of the old release whose database was stopped are ended, so that the scheduler starts them again on their data.
        """
        old = await patiently(lambda: self._stores.releases.get(deployment.old_release))

        async def idle(seen: Seen) -> list[Job]:
            listed = seen.jobs(old.id)
            jobs = await patiently(lambda: self._stores.jobs.all(deployment.app))
            return [
                job
                for job in jobs
                if job.release == old.id and job.type == database and job.host_id
                and job.state in (JobState.UP, JobState.STARTING) and not {job.id, job.uuid} & listed
            ]  # fmt: skip

        async def expected(seen: Seen) -> int:
            counts = await patiently(lambda: self._counts(deployment.app, old.id))
            return max(0, counts.get(database, 0) - len(await idle(seen)))

        async def start(seen: Seen) -> None:
            waiting, listed = await idle(seen), seen.jobs(old.id)
            if waiting:
                try:
                    async with self._hosts.open(waiting[0].host_id) as host:
                        await host.stop_job(waiting[0].id)
                except ApiError as error:
                    raise NoProgress(f"job {waiting[0].id} cannot be started again: {error.message}") from error
                await replacement.until(
                    lambda now: bool(now.jobs(old.id) - listed), f"job {waiting[0].id} was not started again"
                )  # fmt: skip
                return
            count = (await patiently(lambda: self._counts(deployment.app, old.id))).get(database, 0)
            async with ScaleWatch(self._stores, deployment, old.id, old.processes) as watch:
                requests = await self._stores.formations.change(deployment.app, [Change(old.id, {database: count + 1})])
                await watch.completed(requests[-1], replacement.limit)

        async def told(release: str, state: str) -> None:
            await patiently(lambda: self._stores.deployments.step(deployment, release, database, state))

        replacement = self._replacement(deployment, old, database, expected, start, told)
        await replacement.run(back=True)

    async def _batch(self, deployment: Deployment) -> int:
        needs_hosts = deployment.strategy == Strategy.IN_BATCHES and not deployment.deploy_batch_size
        hosts = await self._hosts.count() if needs_hosts else 1
        return batch_size(deployment.strategy, deployment.deploy_batch_size, hosts)

    async def _progress(self, deployment: Deployment, new: Release, batch: int) -> Progress:
        return Progress(
            wanted=deployment.processes or {},
            types=new.processes,
            old=await self._counts(deployment.app, deployment.old_release),
            new=await self._counts(deployment.app, deployment.new_release),
            batch=batch,
        )

    async def _counts(self, app_id: str, release_id: str) -> Processes:
        if not release_id:
            return {}
        try:
            return (await self._stores.formations.get(app_id, release_id)).processes or {}
        except NotFound:
            return {}

    async def _settle(self, deployment: Deployment, new: Release) -> None:
        """Wait for what an earlier attempt asked for, lest old jobs go before the new ones are up."""
        formation = await self._stores.formations.expanded(deployment.app, new.id)
        if formation is None or formation.pending_scale_request is None:
            return
        pending = formation.pending_scale_request
        async with ScaleWatch(self._stores, deployment, new.id, new.processes) as watch:
            await watch.completed(pending, timedelta(seconds=deployment.deploy_timeout))

    async def _scale(self, deployment: Deployment, new: Release, step: Step) -> None:
        limit = timedelta(seconds=deployment.deploy_timeout)
        changes = []
        match step:
            case ScaleNew(processes):
                changes = [await self._raised(deployment, new, processes)]
            case ScaleOld(processes):
                changes = [Change(deployment.old_release, dict(processes))]
            case Swap(lowered, processes):
                # In this order: the scheduler is to hear of the end of the old jobs first.
                changes = [Change(deployment.old_release, dict(lowered))] if lowered else []
                changes.append(await self._raised(deployment, new, processes))
        last = changes[-1].release
        # Only jobs of the new release that go down while it is being raised are failures.
        async with ScaleWatch(self._stores, deployment, last, new.processes if last == new.id else ()) as watch:
            requests = await self._stores.formations.change(deployment.app, changes)
            if not isinstance(step, ScaleOld) or step.wait:
                await watch.completed(requests[-1], limit)

    async def _raised(self, deployment: Deployment, new: Release, processes: Counts) -> Change:
        return Change(new.id, dict(processes), await self._initial_tags(deployment, new))

    async def _initial_tags(self, deployment: Deployment, new: Release) -> Tags | None:
        try:
            await self._stores.formations.get(deployment.app, new.id)
        except NotFound:
            return {name: tags for name, tags in (deployment.tags or {}).items() if name in new.processes} or None
        return None

    async def _give_up(self, deployment: Deployment, reason: str) -> None:
        """Bring the old release back to its counts, drop the new one, and only then close the deployment."""
        log.info("deployment failed", extra={"deployment": deployment.id, "reason": reason})
        await patiently(lambda: self._stores.deployments.condemn(deployment, reason))
        try:
            if await self._begun_with_several(deployment):
                await self._bring_peers_back(deployment, await self._database_of(deployment))
            await self._restore_old(deployment)
            if deployment.new_release != deployment.old_release:
                await self._stores.formations.delete(deployment.app, deployment.new_release)
        except (NotFound, ValidationError) as error:
            # The app or a release has been deleted meanwhile, or the new one was never scaled: nothing to roll back.
            log.info("nothing to roll back", extra={"deployment": deployment.id, "because": error.message})
        except (NoProgress, DeploymentError) as error:
            # Both releases stay as they are: the data may be with the peers of either.
            log.error("deployment not rolled back", extra={"deployment": deployment.id, "because": error})
            reason = f"{reason}; and it could not be rolled back: {error}"
        await patiently(lambda: self._stores.deployments.fail(deployment, reason))

    async def _begun_with_several(self, deployment: Deployment) -> bool:
        """Whether peers of the new release may have got a role in a database cluster of several."""
        try:
            database = await self._cluster_of_several(deployment)
        except UnsupportedStrategy:
            return False
        if database is None:
            return False
        await patiently(lambda: self._stores.formations.get(deployment.app, deployment.new_release))
        return True

    async def _restore_old(self, deployment: Deployment) -> None:
        wanted = deployment.processes or {}
        current = await self._counts(deployment.app, deployment.old_release)
        if not deployment.old_release or all(current.get(name, 0) == count for name, count in wanted.items()):
            return
        changes = [Change(deployment.old_release, wanted)]
        if deployment.strategy in IN_PLACE and not await self._begun_with_several(deployment):
            present = await self._counts(deployment.app, deployment.new_release)
            if any(present.values()):
                changes.insert(0, Change(deployment.new_release, dict.fromkeys(present, 0)))
        async with ScaleWatch(self._stores, deployment, deployment.old_release, ()) as watch:
            requests = await self._stores.formations.change(deployment.app, changes)
            try:
                await watch.completed(requests[-1], ROLLBACK_WAIT)
            except DeploymentError as error:
                log.warning("rollback goes on without waiting", extra={"deployment": deployment.id, "error": error})


class ScaleWatch:
    """Watches one release while it is being scaled; opened before the request is made, so that nothing is missed."""

    def __init__(self, stores: Stores, deployment: Deployment, release_id: str, failing_types: Collection[str]) -> None:
        self._stores = stores
        self._app_id = deployment.app
        self._release_id = release_id
        self._failing_types = failing_types
        self._subscription = stores.hub.subscribe()

    async def __aenter__(self) -> ScaleWatch:
        await self._stores.hub.started()
        self._events = await self._subscription.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._subscription.__aexit__(None, None, None)

    async def completed(self, request: ScaleRequest, limit: timedelta) -> None:
        """Return when the scheduler has completed a request.

        Raises:
            DeploymentError: cancelled, not done in time, or too many jobs went down.
        """
        try:
            async with asyncio.timeout(limit.total_seconds()):
                while not await self._reached(request):
                    await self._next_change(request)
        except TimeoutError:
            waited = limit.total_seconds()
            text = f"timed out waiting for scale to complete (waited {waited:g} seconds)"
            raise DeploymentError(text + await self._what_is_waited_for()) from None

    async def _what_is_waited_for(self) -> str:
        try:
            waiting = await self._stores.jobs.waiting(self._app_id, self._release_id)
        except ServiceUnavailable:
            return ""
        return "".join(f"; {job.type} is {job.state}: {job.reason}" for job in waiting[:1])

    async def _reached(self, request: ScaleRequest) -> bool:
        """Look where things stand. A database that is away may be the very thing that is being replaced."""
        while True:
            try:
                current = await self._stores.formations.scale_request(request.id) or request
                if current.state == ScaleState.CANCELLED:
                    raise DeploymentError("scale request cancelled")
                if current.state == ScaleState.COMPLETE:
                    return True
                await self._look_for_failures(request)
            except ServiceUnavailable:
                await asyncio.sleep(DATABASE_PAUSE.total_seconds())
            else:
                return False

    async def _look_for_failures(self, request: ScaleRequest) -> None:
        """Raise `DeploymentError` if too many jobs went down. Asked of the records: a worker that takes over knows."""
        if not self._failing_types:
            return
        ended = await self._stores.jobs.ended_since(request, self._failing_types, TOLERATED_FAILED_STARTS + 1)
        if len(ended) > TOLERATED_FAILED_STARTS:
            raise DeploymentError(failed_start_message(ended[0].type, ended[0].host_error))

    async def _next_change(self, request: ScaleRequest) -> None:
        """Return when the request has changed or a job ended, or after a while in any case."""
        try:
            async with asyncio.timeout(LOOK_AGAIN.total_seconds()):
                async for event in self._events:
                    if event.object_type == EventType.SCALE_REQUEST and event.object_id == request.id:
                        return
                    if self._may_be_a_failure(event):
                        return
        except TimeoutError:
            return
        except Overflowed as error:
            raise ServiceUnavailable("too many events to follow") from error

    def _may_be_a_failure(self, event: Event) -> bool:
        if event.object_type != EventType.JOB or event.app != self._app_id:
            return False
        job = convert(event.data, Job)
        return job.release == self._release_id and job.type in self._failing_types and job.state == JobState.DOWN.value
