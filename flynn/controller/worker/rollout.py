"""Telling the discoverd processes of all nodes which release comes next: the rest is between them.

Each new process finds the one before it on its node, waits for its turn and takes over; the turn goes round in the
metadata that is begun here. spec/discoverd section 10.
"""

from __future__ import annotations

from flynn.aio.backoff import Backoff, attempts
from flynn.discoverd.registry import Registry
from flynn.types.codec import builtins
from flynn.types.errors import ObjectExists, PreconditionFailed
from flynn.types.instance import ServiceMeta
from flynn.types.rollout import Rollout

SERVICE = "discoverd"


async def begin(registry: Registry, deployment: str, release: str) -> None:
    """Have `release` go over the nodes; once for each deployment, so that a worker may come back to it."""
    rollout = Rollout(id=deployment, release=release)
    async for _ in attempts(Backoff()):
        meta = await registry.get_meta(SERVICE) or ServiceMeta()
        if isinstance(meta.data, dict) and meta.data.get("id") == deployment:
            return
        try:
            await registry.put_meta(SERVICE, ServiceMeta(data=builtins(rollout), index=meta.index))
        except (PreconditionFailed, ObjectExists):
            continue  # a process has just marked itself: look again
        return
