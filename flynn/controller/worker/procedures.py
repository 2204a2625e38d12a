"""What the worker can do, by class of queue job."""

from __future__ import annotations

from collections.abc import Mapping

from flynn.blobstore import client as blobstore
from flynn.controller.hosts import Hosts
from flynn.controller.neighbours import Neighbours
from flynn.controller.store.queue import JobClass
from flynn.controller.stores import Stores
from flynn.controller.worker.cleanup import FileCleanup, GarbageCollection
from flynn.controller.worker.databases import DatabaseClusters
from flynn.controller.worker.deletion import AppDeletionProcedure
from flynn.controller.worker.deployments import DeploymentProcedure
from flynn.controller.worker.loop import Procedure
from flynn.discoverd.registry import Registry


def procedures(
    stores: Stores,
    hosts: Hosts,
    neighbours: Neighbours,
    databases: DatabaseClusters,
    directory: Registry,
    *,
    blobstore: str = blobstore.URL,
) -> Mapping[str, Procedure]:
    """Return the procedure of each class of queue job."""
    return {
        JobClass.DEPLOYMENT: DeploymentProcedure(stores, hosts, databases, directory),
        JobClass.APP_DELETION: AppDeletionProcedure(stores, neighbours, blobstore=blobstore),
        JobClass.RELEASE_CLEANUP: FileCleanup(stores, neighbours),
        JobClass.APP_GARBAGE_COLLECTION: GarbageCollection(stores),
    }
