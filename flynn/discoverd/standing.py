"""A member that was removed while it was away does not hear of it: it asks, when nobody leads it, and then observes."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from flynn.discoverd.directory import LiveDirectory
from flynn.discoverd.membership import http_address, raft_address
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError

log = logging.getLogger(__name__)

SILENCE = 10.0  # seconds without a leader; an election takes one or two
CALL_SECONDS = 3.0


async def keep(live: LiveDirectory, identity: Identity) -> NoReturn:
    """Observe as soon as the others have a leader and do not count this node as a member."""
    while True:
        await asyncio.sleep(SILENCE / 2)
        raft = live.raft
        if not raft.is_member or raft.silence < SILENCE:
            continue
        for member in raft.members:
            if member == raft.address:
                continue
            try:
                members = await _members_with_leader(http_address(member), identity)
            except ApiError:
                continue
            if raft.address not in members:
                log.warning("removed from the members while away, observing now", extra={"members": sorted(members)})
                await live.demote(members)
            break


async def _members_with_leader(address: str, identity: Identity) -> set[str]:
    """The members as a node knows them that has a leader. Raises ApiError if it has none, or is blind itself."""
    async with HttpClient(f"https://{address}", tls=identity, timeout=CALL_SECONDS) as http:
        await http.get("/raft/leader")
        return {raft_address(peer) for peer in await http.get("/raft/peers", answer=list[str])}
