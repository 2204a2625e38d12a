"""The blobstore's HTTP surface. spec/blobstore-logs.md section A3.

Who may do what is one rule for all verbs: hosts, the operator and the build pipeline's apps may do everything, a signed
URL (`signing.py`) allows anybody the one verb on the one blob it was signed for. A signed PUT writes its body and
nothing else: the headers that copy another blob or append would reach beyond what was signed.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote

from flynn.aio.clock import Clock
from flynn.blobstore import names
from flynn.blobstore.backend import Backend, Blob, OpenBlob
from flynn.blobstore.conditions import (
    Decision,
    Failed,
    NotModified,
    Partial,
    Span,
    Unsatisfiable,
    Whole,
    decide_read,
    decide_write,
)
from flynn.blobstore.mirror import (
    CAUGHT_UP_PATH,
    MEMBERS_PATH,
    MIRRORED,
    RECORDS_PATH,
    Alone,
    Forwarding,
    Mirror,
    Outdated,
    Record,
    newer_only,
)
from flynn.blobstore.signing import EXPIRES, SIGNATURE, BadSignature, verify
from flynn.http.server import Api, Raw, Request, Streaming
from flynn.identity import ANYONE, access
from flynn.types.codec import encode
from flynn.types.errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    ServiceUnavailable,
    Unauthorized,
    ValidationError,
)
from flynn.types.status import Status

PIPELINE = access(
    "operator", "host", "app:controller", "app:gitreceive", "app:tarreceive", "app:taffy", "app:blobstore"
)

COPY_FROM = "Blobstore-Copy-From"
OFFSET = "Blobstore-Offset"
SHA512_256 = "Blobstore-Sha512-256"  # the store's own measurement, for those who must not trust the uploader's


MEMBERS = access("app:blobstore")


def blobstore_api(backend: Backend, *, signing_key: str, clock: Clock, mirror: Mirror | None = None) -> Api:
    """Return the API over one back end; with an empty `signing_key` no signed URL is accepted."""
    handlers = _Handlers(backend, signing_key, clock, mirror or Alone())
    api = Api("blobstore", status=handlers.status)
    if mirror is not None:

        async def records(request: Request) -> list[Record]:
            return await mirror.records()

        async def members(request: Request) -> list[str]:
            return mirror.members()

        async def caught_up(request: Request) -> bool:
            return mirror.caught_up()

        api.route("GET", CAUGHT_UP_PATH, caught_up, allow=MEMBERS)
        api.route("GET", RECORDS_PATH, records, allow=MEMBERS)
        api.route("GET", MEMBERS_PATH, members, allow=MEMBERS)
    api.route("GET", "/", handlers.listing, allow=ANYONE)
    api.route("HEAD", "/", handlers.ping, allow=ANYONE)
    for method, handler in (
        ("GET", handlers.get),
        ("HEAD", handlers.head),
        ("PUT", handlers.put),
        ("DELETE", handlers.delete),
    ):
        api.route(method, "/{name:.+}", handler, allow=ANYONE)
    api.route("*", "/{name:.+}", handlers.no_such_method, allow=ANYONE)
    return api


class _Handlers:
    def __init__(self, backend: Backend, signing_key: str, clock: Clock, mirror: Forwarding) -> None:
        self._backend = backend
        self._mirror = mirror
        self._signing_key = signing_key
        self._clock = clock

    async def status(self) -> Status:
        """Healthy while the back end answers."""
        try:
            await self._backend.children("/")
        except OSError as error:
            raise ServiceUnavailable(f"the back end does not answer: {error}") from error
        return Status()

    async def ping(self, request: Request) -> None:
        return

    async def listing(self, request: Request) -> Raw:
        if not PIPELINE.admits(request.peer):
            raise _refused(request)
        directory = request.query("dir") or "/"
        children = await self._backend.children(names.clean(directory)) if directory.startswith("/") else []
        return Raw(encode([_shown(child) for child in children]) + b"\n", "application/json")

    async def get(self, request: Request) -> Raw | Streaming:
        name = self._admitted(request)
        if isinstance(name, Raw):
            return name
        opening = self._backend.open(name)
        opened = await opening.__aenter__()
        handed_over = False
        try:
            decision = _decide(request, opened.blob)
            answer = _head(opened.blob, decision)
            if answer.status not in (200, 206) or not opened.blob.size:
                return answer

            async def body() -> AsyncIterator[bytes]:
                try:
                    async with aclosing(_body(opened, decision)) as pieces:
                        async for piece in pieces:
                            yield piece
                finally:
                    await opening.__aexit__(None, None, None)

            handed_over = True
            return Streaming(body(), answer.content_type, answer.status, answer.headers)
        finally:
            if not handed_over:
                await opening.__aexit__(None, None, None)

    async def head(self, request: Request) -> Raw:
        name = self._admitted(request)
        if isinstance(name, Raw):
            return name
        blob = await self._backend.find(name)
        if blob is None:
            raise NotFound(f"there is no blob {name}")
        return _head(blob, _decide(request, blob))

    async def put(self, request: Request) -> Raw:
        name = self._admitted(request)
        if isinstance(name, Raw):
            return name
        names.check(name)
        if MEMBERS.admits(request.peer) and request.header(MIRRORED):
            return await self._put_mirrored(request, name)
        source, offset = request.header(COPY_FROM), _offset(request.header(OFFSET))
        if (source or offset) and not PIPELINE.admits(request.peer):
            raise Forbidden("a signed URL allows neither copying nor appending")

        def guard(old: Blob | None) -> None:
            if isinstance(decide_write(request.header, etag=old.etag if old else None), Failed):
                raise PreconditionFailed(f"{name} is not what the precondition says")

        if source:
            blob = await self._backend.copy(names.clean(source), name, guard=guard)
        elif offset:
            blob = await self._backend.append(name, _whole_body(request), offset=offset, guard=guard)
        else:
            blob = await self._backend.put(
                name, _whole_body(request), content_type=request.header("Content-Type"), guard=guard
            )
        await self._mirror.put(name)
        return Raw(headers={"Etag": blob.etag, SHA512_256: blob.sha512_256})

    async def _put_mirrored(self, request: Request, name: str) -> Raw:
        """A write that another member has committed: it goes no further."""
        try:
            modified = datetime.fromisoformat(request.header(MIRRORED))
        except ValueError as error:
            raise ValidationError(MIRRORED, "is not a time") from error
        kind = request.header("Content-Type")
        try:
            await self._backend.put(
                name, _whole_body(request), content_type=kind, modified=modified, guard=newer_only(modified)
            )
        except Outdated:
            pass  # ours was written later, and the sender hears of it from us
        return Raw()

    async def delete(self, request: Request) -> Raw | None:
        name = self._admitted(request)
        if isinstance(name, Raw):
            return name

        def guard(old: Blob | None) -> None:
            if isinstance(decide_write(request.header, etag=old.etag if old else None), Failed):
                raise PreconditionFailed(f"{name} is not what the precondition says")

        await self._backend.delete(name, guard=guard)
        if not (MEMBERS.admits(request.peer) and request.header(MIRRORED)):
            await self._mirror.delete(name)
        return None

    async def no_such_method(self, request: Request) -> Raw:
        return Raw(status=405)

    def _admitted(self, request: Request) -> str | Raw:
        """Return the blob's name, or the redirect that an unclean path is answered with. Raises a refusal."""
        name = names.clean(request.raw_path)
        if PIPELINE.admits(request.peer):
            if name != request.raw_path:
                return Raw(status=301, headers={"Location": quote(name, errors="surrogateescape")})
            return name
        if not request.has_query(SIGNATURE):
            raise _refused(request)
        try:
            verify(
                self._signing_key,
                request.method,
                request.raw_path,
                expires=request.query(EXPIRES),
                given=request.query(SIGNATURE),
                now=self._clock.now(),
            )
        except BadSignature as error:
            raise Forbidden(str(error)) from error
        if name != request.raw_path:
            raise Forbidden("a signed URL names its blob by a clean path")
        return name


def _refused(request: Request) -> Unauthorized | Forbidden:
    if request.peer is None:
        return Unauthorized("a client certificate of the cluster or a signed URL is needed")
    return Forbidden(f"{request.peer} may not use the blobstore")


def _decide(request: Request, blob: Blob) -> Decision:
    return decide_read(request.header, etag=blob.etag, modified=blob.modified, size=blob.size)


def _head(blob: Blob, decision: Decision) -> Raw:
    """The answer without its data: what HEAD gets, and what GET begins with."""
    headers = {
        "Accept-Ranges": "bytes",
        "Etag": blob.etag,
        "Last-Modified": format_datetime(blob.modified, usegmt=True),
        SHA512_256: blob.sha512_256,
    }
    match decision:
        case Whole():
            headers["Content-Length"] = str(blob.size)
            return Raw(b"", blob.content_type, 200, headers)
        case Partial((span,)):
            headers["Content-Length"] = str(span.length)
            headers["Content-Range"] = f"bytes {span.start}-{span.end}/{blob.size}"
            return Raw(b"", blob.content_type, 206, headers)
        case Partial(spans):
            boundary = uuid.uuid5(uuid.NAMESPACE_OID, blob.object_id + repr(spans)).hex
            length = sum(len(_part_head(blob, span, boundary)) + span.length for span in spans)
            headers["Content-Length"] = str(length + len(_part_end(boundary)))
            return Raw(b"", f"multipart/byteranges; boundary={boundary}", 206, headers)
        case NotModified():
            return Raw(b"", status=304, headers=headers)
        case Failed():
            raise PreconditionFailed(f"{blob.name} is not what the precondition says")
        case Unsatisfiable():
            return Raw(b"", status=416, headers={"Content-Range": f"bytes */{blob.size}"})


async def _body(opened: OpenBlob, decision: Decision) -> AsyncGenerator[bytes, None]:
    blob = opened.blob
    match decision:
        case Partial(spans) if len(spans) > 1:
            boundary = uuid.uuid5(uuid.NAMESPACE_OID, blob.object_id + repr(spans)).hex
            for span in spans:
                yield _part_head(blob, span, boundary)
                async for piece in opened.read(span):
                    yield piece
            yield _part_end(boundary)
        case Partial((span,)):
            async for piece in opened.read(span):
                yield piece
        case _:
            async for piece in opened.read(Span(0, blob.size - 1)):
                yield piece


def _part_head(blob: Blob, span: Span, boundary: str) -> bytes:
    kind = f"Content-Type: {blob.content_type}\r\n" if blob.content_type else ""
    return f"\r\n--{boundary}\r\n{kind}Content-Range: bytes {span.start}-{span.end}/{blob.size}\r\n\r\n".encode()


def _part_end(boundary: str) -> bytes:
    return f"\r\n--{boundary}--\r\n".encode()


async def _whole_body(request: Request) -> AsyncIterator[bytes]:
    """The body; a client that breaks off must not look like one that is done."""
    received = 0
    async for chunk in request.chunks():
        received += len(chunk)
        yield chunk
    expected = request.content_length
    if expected is not None and not request.header("Content-Encoding") and received != expected:
        raise ConnectionError(f"the client sent {received} of {expected} bytes")


def _offset(header: str) -> int:
    if not header:
        return 0
    if not header.isascii() or not header.isdigit():
        raise ValidationError(OFFSET, "is not a number of bytes")
    if int(header) > 1 << 62:
        raise Conflict(f"no blob has {header} bytes")
    return int(header)


def _shown(name: str) -> str:
    """A name as JSON can carry it: bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
