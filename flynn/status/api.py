"""The status page: every path, every method. Who is asked, and who may look."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from flynn.http.server import Api, Raw, Request
from flynn.identity.access import access
from flynn.identity.peer import PeerKind
from flynn.status.checks import is_free
from flynn.types.codec import builtins, encode
from flynn.types.status import Status, StatusDocument

CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Accept, Content-Type",
}

READERS = access("operator", "host", "app:*", "outside")


def status_api(check: Callable[[], Awaitable[Status]], key: str) -> Api:
    """`key` empty: everybody may look."""

    async def page(request: Request) -> Raw:
        if request.method == "OPTIONS":
            return Raw(b"", "text/plain", HTTPStatus.OK, CORS)
        if key and not _may_look(request, key):
            return Raw(b"", status=HTTPStatus.UNAUTHORIZED, headers=CORS)
        status = await check()
        code = HTTPStatus.OK if status.healthy else HTTPStatus.INTERNAL_SERVER_ERROR
        return Raw(encode(builtins(StatusDocument(data=status))), "application/json", code, CORS)

    api = Api("status")
    # The page replaces what every API has, its own status included: asked at any path, it tells about the cluster.
    api.endpoints = [endpoint for endpoint in api.endpoints if endpoint.path == "/ping"]
    api.route("*", "/{path:.*}", page, allow=READERS)
    return api


def _may_look(request: Request, key: str) -> bool:
    peer = request.peer
    # Only the router's word about where a request came from counts; parts of the platform may always look.
    if peer is None or peer.kind is not PeerKind.OUTSIDE or is_free(request.remote):
        return True
    offered = request.basic_auth[1] if request.basic_auth else request.query("key")
    return hmac.compare_digest(offered.encode(), key.encode())
