"""`flynn-controller web|worker|scheduler`: one program, three daemons.

`web` serves the API, `worker` does the background work; `scheduler` is the scheduler's own program. Both of ours need
the database to begin and then outlive its absence: requests during a gap get 503 with `retry`, streams stay open.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta

from flynn import daemon
from flynn.aio.backoff import Backoff, retrying
from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.controller.api.server import Door, controller_api
from flynn.controller.config import Config, configuration
from flynn.controller.database import Database
from flynn.controller.hosts import Hosts
from flynn.controller.migrate import migrate
from flynn.controller.neighbours import Neighbours
from flynn.controller.store.retention import Retention
from flynn.controller.stores import Stores
from flynn.controller.worker.databases import DatabaseClusters
from flynn.controller.worker.forgetting import forget_regularly
from flynn.controller.worker.loop import Worker
from flynn.controller.worker.procedures import procedures
from flynn.discoverd.client import Discoverd
from flynn.discoverd.instances import instance_from_environment
from flynn.http.server import Api, listen
from flynn.identity import Identity
from flynn.logaggregator import client as logaggregator
from flynn.types.errors import ServiceUnavailable
from flynn.types.status import Status
from flynn.version import VERSION

log = logging.getLogger(__name__)

USAGE = "usage: flynn-controller web|worker|scheduler"
DATABASE_PATIENCE = timedelta(minutes=5)  # at start; the host starts a job that gave up again
DATABASE_BACKOFF = Backoff(first=timedelta(milliseconds=200), limit=timedelta(seconds=2))


@asynccontextmanager
async def _stores(config: Config) -> AsyncIterator[Stores]:
    """Connect to the database, wait until it takes writes, and bring its schema up to date."""
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it tells of every failed attempt; we tell of what follows
    async with Database(config.database).connected() as database, supervisor() as spawn:
        await retrying(
            lambda: _migrated(database), on=ServiceUnavailable, policy=DATABASE_BACKOFF, within=DATABASE_PATIENCE
        )
        stores = Stores.over(database, default_domain=config.domain, name_seed=config.name_seed)
        spawn("follow events", stores.hub.run())
        await stores.hub.started()
        yield stores


async def _migrated(database: Database) -> None:
    try:
        await migrate(database)
    except ServiceUnavailable as error:
        log.info("waiting for the database", extra={"because": error.__cause__ or error})
        raise


@asynccontextmanager
async def web(environ: Mapping[str, str]) -> AsyncIterator[None]:
    """Serve the API."""
    identity = Identity.from_environment(environ)
    config = configuration(environ, identity)
    door = Door()
    async with (
        Discoverd.from_environment(environ) as registry,
        _stores(config) as stores,
        logaggregator.inside(identity) as aggregator,
    ):
        api = controller_api(
            stores,
            keys=config.keys,
            ca_cert=config.ca_cert,
            domain=config.domain,
            hosts=Hosts(registry, identity),
            neighbours=Neighbours(identity),
            aggregator=aggregator,
            door=door,
        )
        own = instance_from_environment(environ, config.port, "https")
        async with listen(api, "0.0.0.0", config.port, tls=identity):
            try:
                async with registry.registered("controller", own):
                    yield
            finally:
                # Out of the directory already: whoever still comes is told to try the next one.
                door.open = False
                stores.hub.stop(door.reason)


@asynccontextmanager
async def worker(environ: Mapping[str, str]) -> AsyncIterator[None]:
    """Do the background work."""
    identity = Identity.from_environment(environ)
    config = configuration(environ, identity)
    async with Discoverd.from_environment(environ) as registry, _stores(config) as stores:

        async def status() -> Status:
            await stores.database.ping()
            return Status(version=VERSION)

        api = Api("controller-worker", status=status)
        known = procedures(
            stores, Hosts(registry, identity), Neighbours(identity), DatabaseClusters(registry, identity), registry
        )
        own = instance_from_environment(environ, config.port, "https")
        async with (
            listen(api, "0.0.0.0", config.port, tls=identity),
            registry.registered("controller-worker", own),
            TaskSet() as tasks,
            supervisor() as spawn,
        ):
            spawn("forget", forget_regularly(Retention(stores.database), SystemClock()))
            spawn("work", Worker(stores.queue, stores.hub, known, tasks).run())
            yield


def main() -> None:
    """Be the daemon that the first argument names."""
    match sys.argv[1:]:
        case ["web"]:
            daemon.run("controller", lambda: web(os.environ))
        case ["worker"]:
            daemon.run("controller-worker", lambda: worker(os.environ))
        case ["scheduler"]:
            from flynn.scheduler.main import main as scheduler

            del sys.argv[1]
            scheduler()
        case _:
            print(USAGE, file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
