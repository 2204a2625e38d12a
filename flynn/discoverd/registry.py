"""The service directory as its users see it: one interface, two implementations.

`client.Discoverd` speaks to the daemon, `memory.MemoryRegistry` is the directory inside one process, for tests and for
whatever runs before there is a cluster. Both pass the same contract tests (tests/discoverd/test_registry_contract.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from flynn.types.instance import DiscoverdEvent, Instance, LeaderType, ServiceMeta


class Registration(Protocol):
    """An instance that is kept registered."""

    @property
    def instance(self) -> Instance: ...

    async def set_meta(self, meta: Mapping[str, str]) -> None:
        """Replace the metadata of the instance (all of it, FLYNN_* keys included) and announce it at once."""


class Registry(Protocol):
    """Absence is an answer here, not an error: no instances is `[]`, no leader and no metadata is None."""

    async def create(self, service: str, leader_type: LeaderType = LeaderType.OLDEST) -> bool:
        """Make sure the service exists; False if it did before (whatever its leader type is then)."""

    async def remove(self, service: str) -> None:
        """Remove the service with all its instances and metadata. Raises NotFound."""

    async def instances(self, service: str) -> list[Instance]:
        """The instances in order of registration; empty also for an unknown service."""

    async def leader(self, service: str) -> Instance | None: ...

    async def set_leader(self, service: str, instance_id: str) -> None:
        """Raises ValidationError unless the service has leader type manual. The instance may come later."""

    async def get_meta(self, service: str) -> ServiceMeta | None: ...

    async def put_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        """Write `meta` if its index is still current (0: there is none yet); the answer carries the new index.

        Raises:
            ObjectExists: index 0, but there is metadata.
            PreconditionFailed: someone wrote in between; read and decide again.
            NotFound: no such service.
        """

    async def register(self, service: str, instance: Instance) -> None:
        """Put the instance once, which is also how one heartbeat is given. Raises NotFound without the service."""

    async def deregister(self, service: str, instance_id: str) -> None: ...

    async def forget_job(self, job_id: str) -> None:
        """Remove every instance whose metadata name this job (`FLYNN_JOB_ID`), for a host whose job has ended."""

    def registered(
        self, service: str, instance: Instance, *, leader_type: LeaderType = LeaderType.OLDEST
    ) -> AbstractAsyncContextManager[Registration]:
        """Keep `instance` registered while the block is open: heartbeats go out until it is left, then it is removed.

        The service is created if it is missing, also when it vanishes later. Enter it once the port answers. One
        process may hold many of these at the same time.
        """

    def watch(self, service: str) -> AsyncGenerator[DiscoverdEvent, None]:
        """What is there, then `current` (once), then every change, for ever.

        The service need not exist. A lost connection is restored in the background and only differences are told, so
        the events always add up to the truth: `down` comes for what vanished meanwhile.
        """

    def watch_leader(self, service: str) -> AsyncGenerator[Instance | None, None]:
        """The leader now (None: there is none), then each one that follows."""
