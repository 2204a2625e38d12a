"""Who may call what, endpoint by endpoint."""

from __future__ import annotations

from typing import Any, cast

import pytest

from flynn.host.api import HostApi
from flynn.identity.peer import Peer, PeerKind

OPERATOR, HOST = Peer(PeerKind.OPERATOR, "operator"), Peer(PeerKind.HOST, "node2")
CALLERS = {
    "nobody": None,
    "operator": OPERATOR,
    "host": HOST,
    **{
        name: Peer(PeerKind.APP, name, "web") for name in ("controller", "gitreceive", "flannel", "discoverd", "router")
    },
}
EVERYBODY_INSIDE = set(CALLERS) - {"nobody"}
MAKERS = {"operator", "host", "controller", "gitreceive"}
OPERATORS = {"operator", "host", "controller"}

ALLOWED = {
    "GET /host/jobs": MAKERS,
    "GET /host/jobs/{id}": MAKERS,
    "GET /host/jobs/{id}/stats": MAKERS,
    "PUT /host/jobs/{id}": MAKERS,
    "DELETE /host/jobs/{id}": MAKERS,
    "PUT /host/jobs/{id}/signal/{signal}": MAKERS,
    "PUT /host/jobs/{id}/discoverd-deregister": OPERATORS,
    "POST /attach": MAKERS,
    "GET /host/status": EVERYBODY_INSIDE,
    "POST /host/discoverd": {"operator", "host", "discoverd"},
    "POST /host/network": {"operator", "host", "flannel"},
    "POST /host/resource-check": OPERATORS,
    "POST /host/tags": OPERATORS,
    "POST /host/pull/images": {"operator", "host"},
    "POST /host/update": {"operator", "host"},
    "POST /host/pull/binaries": {"operator", "host"},
    "POST /host/drain": {"operator", "host"},
    "POST /host/tokens": {"operator", "host"},
    "GET /host/ca": set(CALLERS),
    "POST /host/join": set(CALLERS),
    "POST /storage/providers": {"operator", "host"},
    "POST /storage/providers/{provider}/volumes": MAKERS,
    "GET /storage/volumes": MAKERS,
    "GET /storage/volumes/{id}": MAKERS,
    "DELETE /storage/volumes/{id}": MAKERS,
    "PUT /storage/volumes/{id}/snapshot": OPERATORS,
    "POST /storage/volumes/{id}/clone": OPERATORS,
    "POST /storage/volumes/{id}/pull_snapshot": OPERATORS,
    "GET /storage/volumes/{id}/send": {"operator", "host"},
    "GET /sinks": OPERATORS,
    "PUT /sinks/{id}": OPERATORS,
    "DELETE /sinks/{id}": OPERATORS,
    "GET /ping": set(CALLERS),
    "GET /.well-known/status": set(CALLERS),
    "GET /metrics": EVERYBODY_INSIDE,
}


@pytest.fixture(scope="module")
def endpoints() -> dict[str, Any]:
    nothing = cast(Any, None)
    parts = ("node", "book", "runner", "attachments", "volumes", "sinks", "joining", "releases", "update")
    api = HostApi(**dict.fromkeys(parts, nothing)).api()
    return {f"{endpoint.method} {endpoint.path}": endpoint for endpoint in api.endpoints}


def test_the_table_is_complete(endpoints: dict[str, Any]) -> None:
    assert set(endpoints) == set(ALLOWED)


@pytest.mark.parametrize("endpoint", sorted(ALLOWED))
def test_access(endpoints: dict[str, Any], endpoint: str) -> None:
    admitted = {name for name, peer in CALLERS.items() if endpoints[endpoint].allow.admits(peer)}
    assert admitted == ALLOWED[endpoint]
