"""Whether a certificate and a private key belong together and can be served. Asks OpenSSL, as HAProxy will."""

from __future__ import annotations

import ssl
import tempfile
from functools import lru_cache


@lru_cache(maxsize=4096)
def check_pair(cert: str, key: str) -> str | None:
    """What is wrong with the pair (PEM), or None. Expiry and names are not looked at: that is the owner's business."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(f"{cert.strip()}\n{key.strip()}\n")
        file.flush()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file.name, password=lambda: "")
        except (ssl.SSLError, ValueError, TypeError) as error:
            reason = getattr(error, "reason", None) or str(error)
            return str(reason).replace("_", " ").lower()
    return None
