"""Fetching an image manifest by its artifact's URI, and trusting it only as far as its hashes go."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flynn.controller.neighbours import Neighbours
from flynn.types.artifact import Artifact
from flynn.types.codec import decode, sha512_256
from flynn.types.errors import ApiError, ValidationError

MAX_MANIFEST_BYTES = 8 * 1024 * 1024  # of 100 layers, each has 80 kB


class BadManifest(Exception):
    """What was downloaded is not what the artifact announces; `str()` is for the client."""


class ManifestSource:
    """Where manifests come from."""

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours

    async def fetch(self, artifact: Artifact) -> dict[str, object]:
        """Return the manifest of an artifact. Raises `ValidationError` with the reason if that cannot be had."""
        try:
            raw = await self._download(artifact.uri, artifact.size)
            verify(raw, artifact.size, artifact.hashes)
            return decode(raw, dict[str, object])
        except (BadManifest, ApiError) as error:
            reason = error.message if isinstance(error, ApiError) else str(error)
            raise ValidationError("manifest", f"failed to download from {artifact.uri}: {reason}") from error

    async def _download(self, uri: str, size: int) -> bytes:
        if size > MAX_MANIFEST_BYTES:
            raise BadManifest(f"larger than {MAX_MANIFEST_BYTES} bytes")
        raw = bytearray()
        async with self._neighbours.at(uri) as (client, path), client.download(path) as (_, chunks):
            async for chunk in chunks:
                raw += chunk
                if len(raw) > size:
                    break  # the check of the length says what is wrong
        return bytes(raw)


def verify(raw: bytes, size: int, hashes: Mapping[str, str]) -> None:
    """Check a manifest against its announced size and every hash of a known kind. Raises `BadManifest`."""
    actual = {
        "sha256": lambda: hashlib.sha256(raw).hexdigest(),
        "sha512": lambda: hashlib.sha512(raw).hexdigest(),
        "sha512_256": lambda: sha512_256(raw),
    }
    known = sorted(set(hashes) & set(actual))
    if not known:
        raise BadManifest("verify: no hashes provided")
    if len(raw) != size:
        raise BadManifest(f"verify: data too {'short' if len(raw) < size else 'long'}")
    for name in known:
        got = actual[name]()
        if got != hashes[name].lower():
            raise BadManifest(f'verify: expected {name} hash "{hashes[name]}" but got "{got}"')
