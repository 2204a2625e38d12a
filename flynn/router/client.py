"""What a router tells about itself, and how to listen to it. See spec/router section 2.

There is one router per host; each instance of `router-api` has its own events.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from enum import StrEnum

from flynn.http.client import HttpClient
from flynn.types.codec import Wire, always
from flynn.types.route import Route

SERVICE = "router-api"


class RouterEventKind(StrEnum):
    SET = "set"
    REMOVE = "remove"
    BACKEND_UP = "backend-up"
    BACKEND_DOWN = "backend-down"
    BACKEND_DRAINED = "backend-drained"


class BackendInfo(Wire):
    service: str = always("")
    addr: str = always("")
    app: str = always("")
    job_id: str = always("")


class RouterEvent(Wire):
    event: str = always("")
    route: Route | None = None  # without its private key
    backend: BackendInfo | None = None
    error: str = ""


class Router:
    def __init__(self, http: HttpClient) -> None:
        self._http = http

    def events(self, kinds: Iterable[RouterEventKind], *, replay_routes: bool = False) -> AsyncIterator[RouterEvent]:
        """One connection: `backend-up` for what is up, `set` for every route if asked for, then what happens."""
        types = "%2C".join(kinds)
        return self._http.events(f"/events?types={types}{'&replay=set' if replay_routes else ''}", RouterEvent)

    async def routes(self) -> list[Route]:
        """The routes this router serves, without private keys."""
        return await self._http.get("/routes", answer=list[Route])
