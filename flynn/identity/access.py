"""Who may call an endpoint. Deny by default: an endpoint without a rule cannot be declared.

A rule is a set of words: `operator` (the host's admin key, on loopback), `host` (any flynn-host), `app:<name>` (system
jobs of that app), `app:*` (any system job), `outside` (somebody whose request the router passed on: it comes with the
router's certificate, but is not the router's own). `ANYONE` admits callers without a certificate too; the endpoint
then has its own way to tell who calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from flynn.identity.peer import Peer, PeerKind


@dataclass(frozen=True, slots=True)
class Access:
    words: frozenset[str]

    def admits(self, peer: Peer | None) -> bool:
        if "anyone" in self.words:
            return True
        if peer is None:
            return False
        if peer.kind is PeerKind.APP:
            return f"app:{peer.name}" in self.words or "app:*" in self.words
        return peer.kind.value in self.words

    def __str__(self) -> str:
        return " ".join(sorted(self.words))


def access(*words: str) -> Access:
    if not words:
        raise ValueError("an endpoint that nobody may call is not an endpoint")
    for word in words:
        if word not in ("operator", "host", "outside", "anyone") and not word.startswith("app:"):
            raise ValueError(f"not a rule of access: {word!r}")
    return Access(frozenset(words))


ANYONE = access("anyone")
INSIDERS = access("operator", "host", "app:*")
"""Every part of the platform, and nobody else."""
