"""The HTTP surface of a database process, on the port above the database's. See spec/appliances section 5."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from flynn.appliances.sirenia.cluster_state import Role
from flynn.appliances.sirenia.database import Database, DatabaseInfo
from flynn.appliances.sirenia.peer import DATABASE_ROLES, Peer, PeerInfo
from flynn.http.server import Api, Request
from flynn.identity import INSIDERS, access
from flynn.types.codec import Wire
from flynn.types.status import Health, Status

OPERATORS = access("operator", "host", "app:controller")


class FreezeRequest(Wire):
    reason: str = "frozen by an operator"


class ApplianceStatus(Wire):
    peer: PeerInfo
    database: DatabaseInfo


def unhealthy_because(peer: PeerInfo, database: DatabaseInfo) -> str:
    """Why this peer is not what its cluster needs, or an empty string."""
    if peer.state is None:
        return "there is no cluster state"
    if peer.retry_pending is not None:
        return f"the database could not be configured since {peer.retry_pending.isoformat()}"
    if peer.role not in DATABASE_ROLES:
        return f"role {peer.role}: {peer.reason}"
    if not database.running:
        return "the database does not run"
    if not database.user_exists:
        return "the superuser is missing"
    if peer.role is not Role.PRIMARY:
        return ""
    if not database.read_write:
        return "the primary is read-only"
    synced = database.synced_downstream
    if not peer.state.singleton and (peer.state.sync is None or synced is None or synced.id != peer.state.sync.id):
        return "the sync has not caught up"
    return ""


def management_api(name: str, peer: Peer, database: Database, leave: Callable[[], Awaitable[None]]) -> Api:
    """`leave` stops the state machine, then the database, then takes the instance out of the directory."""

    async def current() -> ApplianceStatus:
        return ApplianceStatus(peer=peer.info(), database=await database.info())

    async def health() -> Status:
        now = await current()
        reason = unhealthy_because(now.peer, now.database)
        return Status(status=Health.UNHEALTHY, detail={"reason": reason}) if reason else Status()

    async def get_status(request: Request) -> ApplianceStatus:
        return await current()

    async def stop(request: Request) -> None:
        await leave()

    async def freeze(request: Request) -> None:
        await peer.freeze((await request.body(FreezeRequest)).reason)

    async def unfreeze(request: Request) -> None:
        await peer.unfreeze()

    api = Api(name, status=health)
    api.route("GET", "/status", get_status, allow=INSIDERS)
    api.route("POST", "/stop", stop, allow=OPERATORS)
    api.route("POST", "/freeze", freeze, allow=OPERATORS)
    api.route("POST", "/unfreeze", unfreeze, allow=OPERATORS)
    return api
