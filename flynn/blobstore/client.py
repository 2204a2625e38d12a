"""Typed client of the blobstore.

    blobs = inside(identity)
    info = await blobs.put("/repos/x.tar", chunks, if_match=etag)
    url = sign(key, "PUT", "/slugs/uploads/1.squashfs", within=timedelta(hours=1), now=clock.now())

`inside` is for the platform's own daemons, which show their certificate. Others get a URL made with `sign`, which works
with any HTTP client that trusts the cluster's authority.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import quote

from flynn.blobstore.signing import signed_url
from flynn.http.client import HttpClient, Retry
from flynn.identity import Identity
from flynn.types.errors import NotFound, UnknownError

URL = "https://blobstore.discoverd:80"
LEADER_URL = "https://leader.blobstore.discoverd:80"  # for conditional writes: one place has to decide

PATIENCE = Retry(within=timedelta(seconds=15))  # a blobstore that is being replaced is back within that


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What the store says of a blob."""

    size: int | None  # bytes; a PUT's answer does not tell
    etag: str  # quoted
    sha512_256: str  # hex, measured by the store
    content_type: str

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> BlobInfo:
        """Read the headers of an answer."""
        length = headers.get("Content-Length")
        return cls(
            int(length) if length is not None else None,
            headers.get("Etag", ""),
            headers.get("Blobstore-Sha512-256", ""),
            headers.get("Content-Type", ""),
        )


def inside(identity: Identity, *, url: str = URL) -> Blobstore:
    """Return a client for a daemon of the cluster."""
    return Blobstore(HttpClient(url, tls=identity, retry=PATIENCE))


def sign(key: str, method: str, name: str, *, within: timedelta, now: datetime, url: str = URL) -> str:
    """Return a URL that lets anybody do `method` on blob `name` for that long."""
    return signed_url(url, method, name, key=key, expires=now + within)


class Blobstore:
    """Named blobs. Names are absolute paths."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def __aenter__(self) -> Blobstore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def find(self, name: str) -> BlobInfo | None:
        """Return what is known of a blob, or None if there is none."""
        try:
            return BlobInfo.of(await self._http.head(quote(name)))
        except NotFound:
            return None

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[tuple[BlobInfo, AsyncIterator[bytes]]]:
        """Read a blob piece by piece. Raises NotFound."""
        async with self._http.download(quote(name)) as (headers, chunks):
            yield BlobInfo.of(headers), chunks

    async def read(self, name: str, *, limit: int = 16 << 20) -> bytes:
        """Return a small blob. Raises NotFound, or UnknownError for one larger than `limit` bytes."""
        content = bytearray()
        async with self.open(name) as (_, chunks):
            async for chunk in chunks:
                content += chunk
                if len(content) > limit:
                    raise UnknownError(f"blob {name} has more than {limit} bytes")
        return bytes(content)

    async def put(
        self,
        name: str,
        body: bytes | AsyncIterable[bytes],
        *,
        content_type: str = "application/octet-stream",
        if_match: str | None = None,
        only_create: bool = False,
    ) -> BlobInfo:
        """Create or replace a blob; returns once it is durable.

        Raises:
            PreconditionFailed: the blob is not the version `if_match` (an etag), or exists although `only_create`.
        """
        headers = {"Content-Type": content_type}
        if if_match is not None:
            headers["If-Match"] = if_match
        if only_create:
            headers["If-None-Match"] = "*"
        return BlobInfo.of(await self._http.upload(quote(name), body, headers=headers))

    async def copy(self, source: str, target: str, *, only_create: bool = False) -> BlobInfo:
        """Make `target` the same as `source`, inside the store. Raises NotFound, and what `put` raises."""
        headers = {"Blobstore-Copy-From": source} | ({"If-None-Match": "*"} if only_create else {})
        return BlobInfo.of(await self._http.upload(quote(target), b"", headers=headers))

    async def delete(self, name: str, *, if_match: str | None = None) -> None:
        """Remove a blob and everything below it; none is fine. Raises PreconditionFailed as `put` does."""
        headers = {"If-Match": if_match} if if_match is not None else {}
        await self._http.call("DELETE", quote(name), headers=headers)

    async def children(self, directory: str = "/") -> list[str]:
        """Return the names directly below a directory, directories with a trailing slash."""
        return await self._http.get("/", answer=list[str], params={"dir": directory})
