"""The certificate that the outside world sees: its making, and the pin that clients keep of it."""

from __future__ import annotations

import base64
import hashlib
import ssl
from collections.abc import Sequence

from flynn.identity.authority import ClusterCA


def pin_of(cert_pem: str) -> str:
    """Standard base64 of the SHA-256 of the whole leaf certificate (the first PEM block) in DER form."""
    first = cert_pem[: cert_pem.index("-----END CERTIFICATE-----") + len("-----END CERTIFICATE-----")]
    return base64.b64encode(hashlib.sha256(ssl.PEM_cert_to_DER_cert(first.strip())).digest()).decode()


def site_certificate(domains: Sequence[str]) -> dict[str, str]:
    """A leaf for `domains` from an authority of its own, whose key is forgotten at once."""
    credentials = ClusterCA.create("Flynn Ephemeral CA").issue_site(domains)
    cert = credentials.cert.decode()
    return {"ca_cert": credentials.ca.decode(), "cert": cert, "pin": pin_of(cert), "key": credentials.key.decode()}
