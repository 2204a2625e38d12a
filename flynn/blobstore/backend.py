"""Where blobs are kept: the interface of a back end, and what is known of a blob.

The HTTP side (`api.py`) decides about conditions, ranges and rights; a back end stores bytes durably and knows their
hashes. Contract, checked by `tests/blobstore/test_backend_contract.py` for every implementation:

- `put` and its kin return once the bytes survive a power cut, and show either the old blob or the new one, never a mix.
- A reader that holds an open blob reads the version it opened, whatever happens to the name meanwhile.
- A failing or cancelled upload leaves the old blob untouched.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from flynn.blobstore.conditions import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One version of a named blob."""

    name: str
    object_id: str  # changes with every write
    size: int  # bytes
    content_type: str  # as the writer sent it, may be empty
    sha512: str  # hex; the entity tag is made of it
    sha512_256: str  # hex; what layers are verified and named by
    modified: datetime

    @property
    def etag(self) -> str:
        """The quoted entity tag: standard base64 of the SHA-512, as the original has it."""
        return '"' + base64.b64encode(bytes.fromhex(self.sha512)).decode() + '"'


Guard = Callable[[Blob | None], None]
"""Looks at the blob that is about to be replaced (None: there is none) and raises to refuse."""


def no_guard(_: Blob | None) -> None:
    """Let every write pass."""


class OpenBlob(Protocol):
    """A blob held open for reading."""

    @property
    def blob(self) -> Blob: ...

    def read(self, span: Span) -> AsyncIterator[bytes]:
        """Yield the bytes of `span`, which lies within the blob."""
        ...


class Backend(Protocol):
    """A store of named blobs. Names are clean (`flynn.blobstore.names`)."""

    async def find(self, name: str) -> Blob | None:
        """Return what is known of a blob without touching its data."""
        ...

    def open(self, name: str) -> AbstractAsyncContextManager[OpenBlob]:
        """Hold the present version open. Raises NotFound."""
        ...

    async def put(
        self,
        name: str,
        body: AsyncIterable[bytes],
        *,
        content_type: str = "",
        guard: Guard = no_guard,
        modified: datetime | None = None,
    ) -> Blob:
        """Create or replace. `guard` runs before the upload and again, atomically, with its commit.

        `modified` is when the blob was written first, for one that comes from another store; None = now.
        """
        ...

    async def append(self, name: str, body: AsyncIterable[bytes], *, offset: int, guard: Guard = no_guard) -> Blob:
        """Add to the end. Raises Conflict unless `offset` is the present size, NotFound without a blob."""
        ...

    async def copy(self, source: str, target: str, *, guard: Guard = no_guard) -> Blob:
        """Make `target` the same as `source`, replacing it. Raises NotFound."""
        ...

    async def delete(self, name: str, *, guard: Guard = no_guard) -> None:
        """Remove the blob and everything below `name/`; nothing there is fine."""
        ...

    async def children(self, directory: str) -> list[str]:
        """Return the direct children as full names, directories with a trailing slash, sorted bytewise."""
        ...

    async def records(self) -> Sequence[Blob]:
        """Return what is known of all blobs."""
        ...
