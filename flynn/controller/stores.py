"""The stores of one process, built once and handed to whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from flynn.controller.database import Database
from flynn.controller.hub import EventHub
from flynn.controller.store.apps import AppStore
from flynn.controller.store.artifacts import ArtifactStore
from flynn.controller.store.deployments import DeploymentStore
from flynn.controller.store.events import EventStore
from flynn.controller.store.formations import FormationStore
from flynn.controller.store.jobs import JobStore
from flynn.controller.store.queue import Queue
from flynn.controller.store.releases import ReleaseStore
from flynn.controller.store.removal import ReleaseRemoval
from flynn.controller.store.resources import ResourceStore
from flynn.controller.store.routes import RouteStore
from flynn.controller.store.sinks import SinkStore
from flynn.controller.store.volumes import VolumeStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Everything that is kept, and the hub that tells of changes."""

    database: Database
    hub: EventHub
    apps: AppStore
    artifacts: ArtifactStore
    releases: ReleaseStore
    removal: ReleaseRemoval
    formations: FormationStore
    jobs: JobStore
    deployments: DeploymentStore
    events: EventStore
    resources: ResourceStore
    routes: RouteStore
    volumes: VolumeStore
    sinks: SinkStore
    queue: Queue

    @classmethod
    def over(cls, database: Database, *, default_domain: str = "", name_seed: bytes = bytes(10)) -> Self:
        """Build the stores on one database."""
        events = EventStore(database)
        return cls(
            database=database,
            hub=EventHub(database, events),
            apps=AppStore(database, default_domain=default_domain, name_seed=name_seed),
            artifacts=ArtifactStore(database),
            releases=ReleaseStore(database),
            removal=ReleaseRemoval(database),
            formations=FormationStore(database),
            jobs=JobStore(database),
            deployments=DeploymentStore(database),
            events=events,
            resources=ResourceStore(database),
            routes=RouteStore(database),
            volumes=VolumeStore(database),
            sinks=SinkStore(database),
            queue=Queue(database),
        )
