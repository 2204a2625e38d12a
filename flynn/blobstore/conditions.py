"""Conditional and range requests, as RFC 9110 sections 13 and 14 define them.

Pure: headers and the blob's validators go in, the decision what to send comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

MAX_RANGES = 32  # more than anybody reads with; each one costs a part header

HeaderLookup = Callable[[str], str]
"""Returns the value of a request header, or an empty string."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` up to and including `end`."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start + 1


@dataclass(frozen=True, slots=True)
class Whole:
    """200: send everything."""


@dataclass(frozen=True, slots=True)
class Partial:
    """206: send these spans; several make a multipart answer."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class NotModified:
    """304: the client has it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """412: a precondition does not hold."""


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """416: no span lies within the blob."""


Decision = Whole | Partial | NotModified | Failed | Unsatisfiable


def decide_read(header: HeaderLookup, *, etag: str, modified: datetime, size: int) -> Decision:
    """Decide what a GET or HEAD is answered with. `etag` is quoted."""
    if_match, if_none_match = header("If-Match"), header("If-None-Match")
    if if_match:
        if not _matches(if_match, etag):
            return Failed()
    elif (since := _date(header("If-Unmodified-Since"))) and modified.replace(microsecond=0) > since:
        return Failed()
    if if_none_match:
        if _matches(if_none_match, etag):
            return NotModified()
    elif (since := _date(header("If-Modified-Since"))) and modified.replace(microsecond=0) <= since:
        return NotModified()
    wanted = header("Range")
    if not wanted or not _range_still_applies(header("If-Range"), etag, modified):
        return Whole()
    return decide_range(wanted, size)


def decide_write(header: HeaderLookup, *, etag: str | None) -> Whole | Failed:
    """Decide whether a PUT or DELETE may go on. `etag` is None when the blob does not exist."""
    if_match, if_none_match = header("If-Match"), header("If-None-Match")
    if if_match and (etag is None or not _matches(if_match, etag)):
        return Failed()
    if if_none_match and etag is not None and _matches(if_none_match, etag):
        return Failed()
    return Whole()


def decide_range(wanted: str, size: int) -> Whole | Partial | Unsatisfiable:
    """Decide on a Range header. A header that is not understood is ignored, as the RFC has it."""
    unit, _, sets = wanted.partition("=")
    if unit.strip().lower() != "bytes" or not sets.strip():
        return Whole()
    spans: list[Span] = []
    specs = sets.split(",")
    if len(specs) > MAX_RANGES:
        return Whole()
    for spec in specs:
        found = re.fullmatch(r"(\d{0,18})-(\d{0,18})", spec.strip())
        if found is None or found[1] == found[2] == "":
            return Whole()
        if not found[1]:
            length = min(int(found[2]), size)
            if length:
                spans.append(Span(size - length, size - 1))
            continue
        start, end = int(found[1]), int(found[2] or size - 1) if found[2] or size else 0
        if found[2] and end < start:
            return Whole()
        if start < size:
            spans.append(Span(start, min(end, size - 1)))
    if not spans:
        return Unsatisfiable()
    if sum(span.length for span in spans) > size:
        return Whole()  # overlapping spans are an amplification, not a use
    return Partial(tuple(spans))


def _matches(header: str, etag: str) -> bool:
    if header.strip() == "*":
        return True
    return any(candidate.strip().removeprefix("W/") == etag for candidate in header.split(","))


def _range_still_applies(if_range: str, etag: str, modified: datetime) -> bool:
    if not if_range:
        return True
    if if_range.startswith(('"', "W/")):
        return if_range.strip() == etag
    return _date(if_range) == modified.replace(microsecond=0)


def _date(text: str) -> datetime | None:
    """A header date, or None when there is none or it cannot be read (then it is ignored)."""
    if not text:
        return None
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return when if when.tzinfo else None
