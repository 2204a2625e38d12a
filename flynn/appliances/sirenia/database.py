"""What a database has to offer to be run by a peer. See spec/appliances section 4.7."""

from __future__ import annotations

from typing import Protocol

from flynn.appliances.sirenia.cluster_state import ClusterState, Role
from flynn.types.codec import Wire, always
from flynn.types.instance import Instance


class DatabaseConfig(Wire):
    """What a database is to be. The role is primary, sync, async or none."""

    role: Role
    upstream: Instance | None = always(None)  # whom it replicates from
    downstream: Instance | None = always(None)  # who replicates from it
    state: ClusterState | None = always(None)


class DatabaseInfo(Wire):
    """What the database says about itself. Every key is always there: clients dereference them blindly."""

    config: DatabaseConfig | None = always(None)
    running: bool = always(False)
    synced_downstream: Instance | None = always(None)
    xlog: str = always("")
    user_exists: bool = always(False)
    read_write: bool = always(False)


class DatabaseError(Exception):
    """The database cannot be brought to what was asked for; trying again later may help."""


class Database(Protocol):
    zero_position: str  # the log position before anything was written

    async def apply(self, config: DatabaseConfig) -> None:
        """Bring the database to `config` and return when it is there; with role none it is stopped.

        Applying the same again does nothing. May take minutes. Raises DatabaseError; the caller tries again.
        """

    async def info(self) -> DatabaseInfo:
        """Never fails: what cannot be found out keeps its zero value."""

    async def stop(self) -> None:
        """Stop the server in an orderly way; clients are cut off, committed work is safe."""
