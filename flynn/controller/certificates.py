"""Is this a certificate with its key? Answered by OpenSSL through `ssl`, to spare every process a crypto library."""

from __future__ import annotations

import hashlib
import os
import ssl
import tempfile

from flynn.types.errors import ValidationError
from flynn.types.route import Certificate, Route


def certificate_of(route: Route) -> Certificate | None:
    """Return the certificate a client sent with a route, in either form, trimmed and checked; None if there is none.

    Raises:
        ValidationError: `Certificate invalid: <reason>`.
    """
    if route.certificate is not None and (route.certificate.cert or route.certificate.key):
        cert, key = route.certificate.cert, route.certificate.key
    elif route.tls_cert or route.tls_key:
        cert, key = route.tls_cert, route.tls_key
    else:
        return None
    cert, key = cert.strip(" \n"), key.strip(" \n")
    _check_pair(cert, key)
    return Certificate(cert=cert, key=key)


def fingerprint(certificate: Certificate) -> bytes:
    """Return what tells one stored certificate from another."""
    return hashlib.sha256(certificate.cert.encode()).digest()


def _check_pair(cert: str, key: str) -> None:
    if "-----BEGIN CERTIFICATE-----" not in cert:
        raise ValidationError("", "Certificate invalid: no certificate in PEM form")
    if "PRIVATE KEY-----" not in key:
        raise ValidationError("", "Certificate invalid: no private key in PEM form")
    descriptor, path = tempfile.mkstemp(prefix="flynn-pair-")
    try:
        with open(descriptor, "w") as file:
            file.write(f"{cert}\n{key}\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValidationError("", "Certificate invalid: private key does not match public key") from error
        reason = (error.reason or "unreadable").lower().replace("_", " ")
        raise ValidationError("", f"Certificate invalid: {reason}") from error
    except (OSError, ValueError) as error:
        raise ValidationError("", f"Certificate invalid: {error}") from error
    finally:
        os.unlink(path)
