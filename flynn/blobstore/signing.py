"""Signed URLs: one verb on one blob for a limited time, without a certificate.

A build job runs code nobody has looked at, so it holds no key and no certificate. Whoever starts it (gitreceive) hands
it URLs that it may use and nothing else. The signature covers verb, path and expiry; the query of a signed URL is
`expires` (UNIX seconds) and `signature` (hex HMAC-SHA256). A URL signed for GET also allows HEAD.

Pure: the key and the present time are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime
from urllib.parse import quote, urlencode

EXPIRES = "expires"
SIGNATURE = "signature"


class BadSignature(Exception):
    """The URL is not signed with our key for this verb and path, or its time is over."""


def signature(key: str, method: str, path: str, expires: int) -> str:
    """Return the hex signature over verb, decoded clean path and expiry."""
    message = f"{method}\n{path}\n{expires}"
    return hmac.new(key.encode(), message.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def signed_url(base_url: str, method: str, path: str, *, key: str, expires: datetime) -> str:
    """Return the URL under which a holder may do `method` on `path` (a clean blob name) until `expires`."""
    until = int(expires.timestamp())
    query = urlencode({EXPIRES: until, SIGNATURE: signature(key, method, path, until)})
    return f"{base_url.rstrip('/')}{quote(path)}?{query}"


def verify(key: str, method: str, path: str, *, expires: str, given: str, now: datetime) -> None:
    """Return if `given` signs this request and `now` is before `expires`.

    Raises:
        BadSignature: the text says which of the two; an empty key refuses everything.
    """
    if not key:
        raise BadSignature("signed URLs are not accepted here")
    if not expires.isascii() or not expires.isdigit() or len(expires) > 12:
        raise BadSignature("the expiry of the URL is not a number")
    signed = "GET" if method == "HEAD" else method
    expected = signature(key, signed, path, int(expires))
    if not hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace")):
        raise BadSignature("the signature of the URL does not fit")
    if now.timestamp() >= int(expires):
        raise BadSignature("the URL has expired")
