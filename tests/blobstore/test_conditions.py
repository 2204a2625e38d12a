"""Conditional and range requests, as tables."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.blobstore.conditions import (
    Decision,
    Failed,
    NotModified,
    Partial,
    Span,
    Unsatisfiable,
    Whole,
    decide_range,
    decide_read,
    decide_write,
)

ETAG = '"abc"'
MODIFIED = datetime(2020, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
AT, BEFORE = "Thu, 02 Jan 2020 03:04:05 GMT", "Thu, 02 Jan 2020 03:04:04 GMT"


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        pytest.param("bytes=2-4", Partial((Span(2, 4),)), id="a span"),
        pytest.param("bytes=2-", Partial((Span(2, 9),)), id="to the end"),
        pytest.param("bytes=-3", Partial((Span(7, 9),)), id="suffix"),
        pytest.param("bytes=-30", Partial((Span(0, 9),)), id="suffix longer than the blob"),
        pytest.param("bytes=5-99", Partial((Span(5, 9),)), id="end is cut"),
        pytest.param("bytes=0-0,9-9", Partial((Span(0, 0), Span(9, 9))), id="two spans"),
        pytest.param("bytes=0-1,20-30", Partial((Span(0, 1),)), id="spans outside are dropped"),
        pytest.param("bytes=10-", Unsatisfiable(), id="begins after the end"),
        pytest.param("bytes=-0", Unsatisfiable(), id="empty suffix"),
        pytest.param("bytes=4-2", Whole(), id="backwards is no range"),
        pytest.param("bytes=x", Whole(), id="rubbish is ignored"),
        pytest.param("bytes=", Whole(), id="nothing is ignored"),
        pytest.param("lines=1-2", Whole(), id="another unit is ignored"),
        pytest.param("bytes=0-9,0-9", Whole(), id="amplification is answered plainly"),
    ],
)
def test_ranges_of_ten_bytes(wanted: str, answer: Decision) -> None:
    assert decide_range(wanted, 10) == answer


def test_no_span_fits_an_empty_blob() -> None:
    assert decide_range("bytes=0-", 0) == Unsatisfiable()


@given(st.text(max_size=30), st.integers(0, 20))
def test_spans_always_lie_within_the_blob(text: str, size: int) -> None:
    decision = decide_range("bytes=" + text, size)
    if isinstance(decision, Partial):
        assert all(0 <= span.start <= span.end < size for span in decision.spans)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        pytest.param({}, Whole(), id="plain"),
        pytest.param({"If-None-Match": ETAG}, NotModified(), id="the client has it"),
        pytest.param({"If-None-Match": '"x", W/"abc"'}, NotModified(), id="one of several, weak"),
        pytest.param({"If-None-Match": '"x"', "If-Modified-Since": AT}, Whole(), id="the tag outranks the date"),
        pytest.param({"If-Modified-Since": AT}, NotModified(), id="not modified since"),
        pytest.param({"If-Modified-Since": BEFORE}, Whole(), id="modified since"),
        pytest.param({"If-Modified-Since": "yesterday"}, Whole(), id="an unreadable date is ignored"),
        pytest.param({"If-Match": '"x"'}, Failed(), id="another version was expected"),
        pytest.param({"If-Match": "*"}, Whole(), id="any version was expected"),
        pytest.param({"If-Unmodified-Since": BEFORE}, Failed(), id="modified meanwhile"),
        pytest.param({"Range": "bytes=0-1", "If-Range": ETAG}, Partial((Span(0, 1),)), id="range of this version"),
        pytest.param({"Range": "bytes=0-1", "If-Range": '"x"'}, Whole(), id="range of another version"),
        pytest.param({"Range": "bytes=0-1", "If-Range": AT}, Partial((Span(0, 1),)), id="range by date"),
    ],
)
def test_reads(headers: dict[str, str], answer: Decision) -> None:
    assert decide_read(lambda name: headers.get(name, ""), etag=ETAG, modified=MODIFIED, size=10) == answer


@pytest.mark.parametrize(
    ("headers", "etag", "answer"),
    [
        pytest.param({}, None, Whole(), id="create"),
        pytest.param({}, ETAG, Whole(), id="replace"),
        pytest.param({"If-None-Match": "*"}, None, Whole(), id="create only, and there is none"),
        pytest.param({"If-None-Match": "*"}, ETAG, Failed(), id="create only, but there is one"),
        pytest.param({"If-Match": ETAG}, ETAG, Whole(), id="replace this version"),
        pytest.param({"If-Match": ETAG}, '"x"', Failed(), id="replace this version, but it changed"),
        pytest.param({"If-Match": ETAG}, None, Failed(), id="replace this version, but it is gone"),
    ],
)
def test_writes(headers: dict[str, str], etag: str | None, answer: Decision) -> None:
    assert decide_write(lambda name: headers.get(name, ""), etag=etag) == answer
