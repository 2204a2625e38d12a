"""The two addresses of a member: `ip:1111` for everybody, `ip:1110` for the Raft traffic of the others.

The Raft port is the one below the HTTP port, so one address tells the other and the outside need only know the first.
"""

from __future__ import annotations

from flynn.types.errors import ValidationError


def raft_address(http: str) -> str:
    """Also accepts what old tools send: an URL. Raises ValidationError for anything but `host:port`."""
    host, port = _split(http.removeprefix("http://").removeprefix("https://").rstrip("/"))
    return f"{host}:{port - 1}"


def http_address(raft: str) -> str:
    host, port = _split(raft)
    return f"{host}:{port + 1}"


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 < int(port) < 65536:
        raise ValidationError("peer", f"must be host:port, not {address!r}")
    return host, int(port)
