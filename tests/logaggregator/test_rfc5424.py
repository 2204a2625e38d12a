"""The wire format of log lines."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.logaggregator.rfc5424 import (
    FrameDecoder,
    FramingViolation,
    Malformed,
    Message,
    MessageDecoder,
    Stream,
    decode,
    encode,
    frame,
)

TIME = datetime(2020, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
APP = "6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11"
JOB = "host1-0b4d4b7e-5f7a-4a7e-9a3e-2f1f0d7f4c11"
EXAMPLE = Message(time=TIME, seq=42, host="host1", app=APP, process=f"web.{JOB}", stream=Stream.STDOUT, text=b"hello")
WIRE = f'<190>1 2020-01-02T03:04:05.678900Z host1 {APP} web.{JOB} ID1 [flynn seq="42"] hello'.encode()


def test_the_documented_example() -> None:
    assert encode(EXAMPLE) == WIRE
    assert frame(WIRE).startswith(b"%d <190>1 " % len(WIRE))
    assert decode(WIRE) == EXAMPLE
    assert (EXAMPLE.process_type(), EXAMPLE.job_id()) == ("web", JOB)


def test_an_empty_text_has_no_blank_and_empty_fields_are_dashes() -> None:
    empty = Message(time=TIME, seq=1, host="h", app="", process="", stream=Stream.UNKNOWN, text=b"")
    assert encode(empty) == b'<190>1 2020-01-02T03:04:05.678900Z h - - - [flynn seq="1"]'
    assert decode(encode(empty)) == empty


@pytest.mark.parametrize(
    ("host", "process", "process_type", "job"),
    [
        ("h", "web.h-1", "web", "h-1"),
        ("h", "h-1", "", "h-1"),
        ("a.b", "a.b-1", "", "a.b-1"),
        ("a.b", "web.a.b-1", "web", "a.b-1"),
        ("other", "web.h-1", "web", "h-1"),
        ("other", "h-1", "", "h-1"),
    ],
)
def test_process_ids_are_split_where_the_job_id_begins(host: str, process: str, process_type: str, job: str) -> None:
    message = Message(time=TIME, seq=1, host=host, app="", process=process, stream=Stream.STDOUT, text=b"")
    assert (message.process_type(), message.job_id()) == (process_type, job)


HEAD = b"<190>1 2020-01-02T03:04:05Z h a p ID1 "


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"", "bad header", id="nothing"),
        pytest.param(b"<1>1 2020-01-02T03:04:05Z host", "bad header", id="ends inside the header"),
        pytest.param(HEAD, "missing structured data", id="ends after the message id"),
        pytest.param(HEAD + b"- text", "missing structured data", id="without structured data"),
        pytest.param(HEAD + b'[other seq="1"] x', "missing seq", id="a foreign sender"),
        pytest.param(HEAD + b"[flynn] x", "missing seq", id="without number"),
        pytest.param(HEAD + b'[flynn seq="1', "missing structured data", id="unclosed"),
        pytest.param(HEAD + b'[flynn seq="1"]x', "no blank", id="text without blank"),
        pytest.param(b'<192>1 2020-01-02T03:04:05Z h a p ID1 [flynn seq="1"]', "priority", id="priority too large"),
        pytest.param(b'<190>2 2020-01-02T03:04:05Z h a p ID1 [flynn seq="1"]', "bad header", id="another version"),
        pytest.param(b'<190>1 - h a p ID1 [flynn seq="1"]', "bad header", id="without time"),
        pytest.param(b'<190>1 2020-13-02T03:04:05Z h a p ID1 [flynn seq="1"]', "timestamp", id="month 13"),
    ],
)
def test_what_is_not_ours_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        decode(raw)


def test_other_forms_of_the_same_message() -> None:
    escaped = decode(HEAD + rb'[x@1 a="\"\]\\"][flynn seq="7" b="\]"] text')
    assert (escaped.seq, escaped.text) == (7, b"text")
    east = decode(b'<190>1 2020-01-02T05:04:05.678900123+02:00 h a p ID2 [flynn seq="1"]')
    assert (east.time, east.stream) == (TIME, Stream.STDERR)


@given(st.binary(max_size=200))
def test_the_parser_is_total(garbage: bytes) -> None:
    for raw in (garbage, HEAD + garbage, WIRE[: len(garbage)] + garbage):
        try:
            decode(raw)
        except Malformed:
            pass


@given(
    st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)),
    st.integers(0, 2**32),
    st.binary(max_size=50),
)
def test_round_trip(time: datetime, seq: int, text: bytes) -> None:
    message = Message(
        time=time.replace(tzinfo=UTC), seq=seq, host="h", app="a", process="p", stream=Stream.INIT, text=text
    )
    assert decode(encode(message)) == message


PARTS = st.sampled_from(
    [
        WIRE,
        WIRE[:-5],
        WIRE[:-6],
        WIRE[:-8],
        WIRE.replace(b"42", b"43"),
        WIRE.replace(b"42", b"123456789012345678901"),
        WIRE.replace(b"42", b""),
        WIRE.replace(b"42", b"x"),
        WIRE.replace(b'"42"]', b'"42" a="b"]'),
        WIRE.replace(b'"42"]', b'"42"][x y="z"]'),
        WIRE.replace(b"[flynn", b'[x y="z"][flynn'),
        WIRE.replace(b" hello", b'hello [flynn seq="9"] there'),
        WIRE.replace(b"hello", b'hello [flynn seq="9"] there'),
        WIRE.replace(b"ID1", b"ID2"),
        WIRE.replace(b"web.", b"worker."),
        WIRE.replace(b"05.6789", b"06.6789"),
        WIRE.replace(b"<190>", b"<999>"),
        b' [flynn seq="1"] x',
    ]
)


@given(st.lists(PARTS | st.binary(max_size=30), max_size=8))
def test_what_neighbours_share_changes_no_answer(raws: list[bytes]) -> None:
    decoder = MessageDecoder()
    for raw in raws:
        try:
            alone: Message | None = decode(raw)
        except Malformed:
            alone = None
        try:
            assert decoder.decode(raw) == alone
        except Malformed:
            assert alone is None


@given(st.lists(st.binary(max_size=30), max_size=10), st.integers(1, 40))
def test_frames_survive_any_cutting(messages: list[bytes], cut: int) -> None:
    wire = b"".join(frame(message) for message in messages)
    decoder = FrameDecoder()
    found = [m for at in range(0, len(wire), cut) for m in decoder.feed(wire[at : at + cut])]
    assert found == messages


@pytest.mark.parametrize("wire", [b"hello world", b" x", b"11001 x", b"123456 x", b"1234567", b"-1 x", b"+1 x"])
def test_bad_frames_end_the_stream(wire: bytes) -> None:
    with pytest.raises(FramingViolation):
        FrameDecoder().feed(wire)
