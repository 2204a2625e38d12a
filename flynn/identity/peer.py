"""The name in a certificate: who is at the other end of a connection."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import quote, unquote, urlsplit


class PeerKind(StrEnum):
    HOST = "host"
    APP = "app"
    OPERATOR = "operator"  # holds a host's admin key, on loopback
    OUTSIDE = "outside"  # somebody whose request the router passed on


@dataclass(frozen=True, slots=True)
class Peer:
    """`name` is a host id or an app name; `process` the process type of an app's job."""

    kind: PeerKind
    name: str
    process: str = ""

    @property
    def uri(self) -> str:
        """How a certificate carries the name: `flynn://app/<app>/<process>` or `flynn://host/<id>`."""
        path = "/".join(quote(part, safe="") for part in (self.name, self.process) if part)
        return f"flynn://{self.kind}/{path}"

    def __str__(self) -> str:
        return ":".join(part for part in (self.kind, self.name, self.process) if part)

    @classmethod
    def parse(cls, uri: str) -> Peer | None:
        split = urlsplit(uri)
        if split.scheme != "flynn" or split.netloc not in (PeerKind.HOST, PeerKind.APP):
            return None
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        if not parts[0] or len(parts) > 2:
            return None
        return cls(PeerKind(split.netloc), *parts)


def peer_of(certificate: dict[str, Any] | None) -> Peer | None:
    """The peer named by a verified certificate, in the form of `ssl.SSLSocket.getpeercert()`."""
    for kind, value in (certificate or {}).get("subjectAltName", ()):
        if kind == "URI" and (peer := Peer.parse(value)) is not None:
            return peer
    return None
