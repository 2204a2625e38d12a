"""`flynn-attach/0`, byte by byte."""

from __future__ import annotations

import asyncio

import pytest

from flynn.host import attach
from flynn.host.attach import Attached, Data, Exit, Failure, Frame, Resize, Signal, Stream, Waiting


def source(raw: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    return reader


@pytest.mark.parametrize(
    ("frame", "raw"),
    [
        (Waiting(), "01"),
        (Attached(), "00"),
        (Data(Stream.STDOUT, b"hi\n"), "03 01 00000003 68 69 0a"),
        (Exit(3), "05 00000003"),
        (Exit(-1), "05 ffffffff"),
        (Failure(attach.JOB_NOT_RUNNING), "02 00000015" + attach.JOB_NOT_RUNNING.encode().hex()),
        (Data(Stream.STDERR, b""), "03 02 00000000"),
    ],
)
async def test_what_the_host_sends(frame: Frame, raw: str) -> None:
    assert attach.encode(frame) == bytes.fromhex(raw)
    assert await attach.read_server_frame(source(bytes.fromhex(raw))) == frame


@pytest.mark.parametrize(
    ("frame", "raw"),
    [
        (Data(Stream.STDIN, b"yes\n"), "03 00 00000004 79 65 73 0a"),
        (Data(Stream.STDIN, b""), "03 00 00000000"),
        (Signal(15), "04 0000000f"),
        (Resize(24, 80), "06 0018 0050"),
    ],
)
async def test_what_a_client_sends(frame: Frame, raw: str) -> None:
    assert attach.encode(frame) == bytes.fromhex(raw)
    assert await attach.read_client_frame(source(bytes.fromhex(raw))) == frame


@pytest.mark.parametrize("raw", ["03 01 00000000", "05 00000000", "07", "03 00 7fffffff"])
async def test_what_a_client_may_not_send(raw: str) -> None:
    with pytest.raises(attach.ProtocolViolation):
        await attach.read_client_frame(source(bytes.fromhex(raw)))


async def test_the_end_between_frames_is_an_end_and_inside_a_frame_an_error() -> None:
    assert await attach.read_server_frame(source(b"")) is None
    with pytest.raises(EOFError):
        await attach.read_server_frame(source(bytes.fromhex("03 01 0000")))
