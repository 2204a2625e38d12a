"""Who is who inside a cluster: the certificate authority, the certificates it issues, and who may call what."""

from flynn.identity.access import ANYONE, INSIDERS, Access, access
from flynn.identity.identity import Identity
from flynn.identity.peer import Peer, PeerKind

__all__ = ["ANYONE", "INSIDERS", "Access", "Identity", "Peer", "PeerKind", "access"]
