"""Who may call: the controller keys, on top of the certificate that the listener has already asked for."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

from flynn.http.server import Request
from flynn.identity import Peer
from flynn.types.errors import Unauthorized

ROUTER = "router"  # its certificate stands for the outside world
CA_CERT_PATH = "/ca-cert"
STATUS_PATHS = ("/.well-known/status", "/metrics")


def key_check(keys: Sequence[str]) -> Callable[[Request], None]:
    """Return the check of one request against the accepted keys; no keys at all let nobody in."""
    accepted = [key.encode() for key in keys if key]

    def check(request: Request) -> None:
        _, password = request.basic_auth or ("", "")
        if not password and request.raw_path == CA_CERT_PATH:
            return
        if request.raw_path in STATUS_PATHS and _inside(request.peer):
            return
        # Every key is compared, so that the time tells nothing about which one is close.
        matches = [hmac.compare_digest(password.encode(), key) for key in accepted]
        if not any(matches):
            raise Unauthorized("the key is missing or wrong")

    return check


def _inside(peer: Peer | None) -> bool:
    return peer is not None and peer.name != ROUTER


def cors_headers(domain: str) -> Callable[[Request], Mapping[str, str]]:
    """Return the headers for pages of other origins; credentials only for those of the cluster's own domain."""

    def headers(request: Request) -> Mapping[str, str]:
        origin = request.header("Origin")
        if not origin:
            return {}
        host = urlsplit(origin).hostname or ""
        own = bool(domain) and (host == domain or host.endswith("." + domain))
        return {
            "Access-Control-Allow-Origin": origin,
            "Vary": "Origin",
            **({"Access-Control-Allow-Credentials": "true"} if own else {}),
            "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,HEAD",
            "Access-Control-Allow-Headers": (
                "Auth-Key,Authorization,Accept,Content-Type,If-Match,If-None-Match,X-GRPC-Web"
            ),
            "Access-Control-Expose-Headers": "ETag,Content-Disposition",
            "Access-Control-Max-Age": "3600",
        }

    return headers
