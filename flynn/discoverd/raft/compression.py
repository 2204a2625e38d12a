"""Stands in for `zlib` in pysyncobj's connections, which compress every message anew.

Making zlib's usual state takes 60 us, four times what everything else about a small message takes, and small ones do
not get smaller by it. Both kinds are ordinary zlib streams, so either side may be of another version. Pure.
"""

from __future__ import annotations

import zlib

SMALL_BYTES = 4096
_SMALLEST_WINDOW, _LEAST_MEMORY = 9, 1


def compress(data: bytes, level: int) -> bytes:
    """Return `data` as a zlib stream: small ones stored as they are."""
    if len(data) > SMALL_BYTES:
        return zlib.compress(data, level)
    stored = zlib.compressobj(0, zlib.DEFLATED, _SMALLEST_WINDOW, _LEAST_MEMORY)
    return stored.compress(data) + stored.flush()


decompress = zlib.decompress
