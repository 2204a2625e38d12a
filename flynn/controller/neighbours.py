"""HTTP clients for whom the controller calls by URL: providers, the blobstore, the log aggregator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ValidationError

INSIDE_SUFFIX = ".discoverd"
TIMEOUT = 60.0  # seconds; a provider may have to create a database


class Neighbours:
    """Opens a client for a URL: services of the cluster get our certificate, anybody else plain HTTP or web TLS."""

    def __init__(self, identity: Identity | None) -> None:
        self._identity = identity

    @asynccontextmanager
    async def at(self, url: str, *, timeout: float = TIMEOUT) -> AsyncIterator[tuple[HttpClient, str]]:
        """Open a client of the URL's server; gives it with the URL's path. Raises `ValidationError` for other URLs."""
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValidationError("", f"cannot be called: {url}")
        inside = split.scheme == "https" and split.hostname.endswith(INSIDE_SUFFIX)
        client = HttpClient(f"{split.scheme}://{split.netloc}", tls=self._identity if inside else None, timeout=timeout)
        path = split.path or "/"
        async with client:
            yield client, f"{path}?{split.query}" if split.query else path
