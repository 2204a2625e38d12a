"""What a database has to offer to be run by a peer. See spec/appliances section 4.7."""

from __future__ import annotations

from typing import Protocol

from flynn.appliances.sirenia.cluster_state import ClusterState, Lineage, Role
from flynn.types.codec import Wire, always
from flynn.types.instance import Instance


class DatabaseConfig(Wire):
    """What a database is to be. The role is primary, sync, async or none."""

    role: Role
    upstream: Instance | None = always(None)  # whom it replicates from
    downstream: Instance | None = always(None)  # who replicates from it
    state: ClusterState | None = always(None)


STARTING = "starting"


class DatabaseInfo(Wire):
    """What the database says about itself. The first six keys are always there: clients dereference them blindly."""

    config: DatabaseConfig | None = always(None)
    running: bool = always(False)
    synced_downstream: Instance | None = always(None)
    xlog: str = always("")
    user_exists: bool = always(False)
    read_write: bool = always(False)
    timeline: int = 0  # the branch of history it is on: the primary's own, or the one a standby receives; 0 = unknown
    connected: list[str] = []  # logical ids of the neighbours with whom replication flows right now
    lineage: Lineage | None = None
    detail: str = ""  # what it is busy with, for people; `STARTING` while a standby's server comes up


class Held(Wire):
    """How far a database that acknowledges nothing any more has come."""

    received: str  # everything up to here is safe on this disk
    usable: str  # everything up to here will be there after a promotion


class DatabaseError(Exception):
    """The database cannot be brought to what was asked for; trying again later may help."""


class Database(Protocol):
    zero_position: str  # the log position before anything was written

    def compare(self, a: str, b: str) -> int:
        """-1, 0 or 1 as `a` is before, at or after `b` in the log. Raises ValueError for what is no position."""

    async def apply(self, config: DatabaseConfig) -> None:
        """Bring the database to `config` and return when it is there; with role none it is stopped.

        Applying the same again does nothing, but it ends a `hold`. Making a copy of the upstream may take minutes;
        a primary is read-only until `enable_writes`. Raises DatabaseError; the caller tries again.
        """

    def reconsider(self) -> None:
        """There is a new state: an `apply` that waits for what may not come any more raises DatabaseError soon.

        Nothing is lost by that: a server that was starting goes on, and the next `apply` finds it as far as it is.
        """

    async def hold(self) -> Held:
        """Stop to acknowledge: as a primary no write, as a standby nothing to the upstream, until the next `apply`.

        What this returns is final: nobody was or will be told that something beyond it is safe here. Raises
        DatabaseError.
        """

    async def enable_writes(self, generation: int) -> None:
        """Let a primary that still has the configuration of this generation be written to."""

    async def record_lineage(self, lineage: Lineage) -> None: ...

    async def info(self) -> DatabaseInfo:
        """Never fails: what cannot be found out keeps its zero value."""

    def interrupt(self) -> None:
        """Before `stop`: give up what takes long, so that a pending `apply` raises DatabaseError soon."""

    async def stop(self) -> None:
        """Stop the server in an orderly way; clients are cut off, committed work is safe."""
