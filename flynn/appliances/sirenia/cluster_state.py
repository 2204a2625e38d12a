"""The cluster state document, kept as metadata of the database's discoverd service. See spec/appliances section 2.

Its JSON is contract: clients of the database wait for `singleton` or `sync`, repair and deployment read the rest.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec

from flynn.types.codec import Json, Wire, always, convert
from flynn.types.errors import ApiError
from flynn.types.instance import Instance


class Role(StrEnum):
    """What a peer is in its cluster. `none` is what a database is configured for while its peer has no such role."""

    UNKNOWN = "unknown"
    PRIMARY = "primary"
    SYNC = "sync"
    ASYNC = "async"
    UNASSIGNED = "unassigned"
    DEPOSED = "deposed"
    NONE = "none"


class Freeze(Wire):
    """While set, nobody takes over and no peer is added."""

    frozen_at: datetime
    reason: str


class ClusterState(Wire):
    """Who is what since when. `generation` grows whenever the primary or the sync changes."""

    generation: int
    freeze: Freeze | None = None
    singleton: bool = False
    init_wal: str = always("")  # the primary's log position when this generation was declared
    primary: Instance | None = always(None)
    sync: Instance | None = always(None)
    asyncs: list[Instance] | None = msgspec.field(name="async", default_factory=lambda: None)
    deposed: list[Instance] = []


class Lineage(Wire):
    """What a peer's data descend from: kept beside the data, written only while replication was seen to flow.

    Log positions can only be compared within one history. A former primary may be *ahead* of everybody with writes
    that nobody else has; what makes a copy trustworthy is to have followed the members of the cluster.
    """

    generation: int
    primary: str = ""  # logical ids
    upstream: str = ""


class BadClusterState(Exception):
    """The service's metadata is not a cluster state; the last good one stays in force."""


def parse_state(data: Json) -> ClusterState:
    try:
        state = convert(data, ClusterState)
    except ApiError as error:
        raise BadClusterState(f"the service metadata is not a cluster state: {error.message}") from error
    if state.primary is None:
        raise BadClusterState("the service metadata names no primary")
    return state
