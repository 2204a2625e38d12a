"""The frames of `flynn-attach/0`: what runs over a connection after `POST /attach` was answered with 101.

Shared by the host (which serves attachments), the controller (which pipes them) and the command line client (which
reads them). Pure: bytes in, values out, no sockets except the two thin readers at the end. All integers are
big-endian. spec/host.md section 6 is the contract.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

PROTOCOL = "flynn-attach/0"

JOB_NOT_RUNNING = "host: job not running"  # clients compare these two texts
JOB_ATTACHED = "host: job is attached"

MAX_FRAME_BYTES = 16 << 20  # a peer announcing more is broken or hostile; our own frames stay below 64 KiB


class Stream(enum.IntEnum):
    """Stream numbers of data frames; stdin only travels from client to server."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    INIT_LOG = 3


class FrameType(enum.IntEnum):
    """First byte of every frame. The first three double as the state byte that opens an attachment."""

    SUCCESS = 0
    WAITING = 1
    ERROR = 2
    DATA = 3
    SIGNAL = 4
    EXIT = 5
    RESIZE = 6


class ProtocolViolation(Exception):
    """The peer sent something the protocol does not allow; the connection cannot be read any further."""


class AttachRefused(Exception):
    """The server answered an attachment with an error frame, before or after data. `str()` is its message."""


@dataclass(frozen=True, slots=True)
class Attached:
    """The job is there; data frames follow."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The host does not know the job yet; `Attached` or `Failure` follows once it does."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Last frame: the attachment failed, or the job did."""

    message: str


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of one stream; empty means the stream has ended (or, from the client, that stdin is closed)."""

    stream: Stream
    data: bytes


@dataclass(frozen=True, slots=True)
class Signal:
    """Deliver a signal to the job's main process."""

    number: int


@dataclass(frozen=True, slots=True)
class Exit:
    """Last frame: the job's exit status."""

    status: int


@dataclass(frozen=True, slots=True)
class Resize:
    """New size of the terminal, in characters."""

    height: int
    width: int


Frame = Attached | Waiting | Failure | Data | Signal | Exit | Resize
ServerFrame = Attached | Waiting | Failure | Data | Exit
ClientFrame = Data | Signal | Resize


def encode(frame: Frame) -> bytes:
    """Return the bytes of one frame."""
    match frame:
        case Attached():
            return b"\x00"
        case Waiting():
            return b"\x01"
        case Failure(message):
            text = message.encode()
            return struct.pack(">BI", FrameType.ERROR, len(text)) + text
        case Data(stream, data):
            return struct.pack(">BBI", FrameType.DATA, stream, len(data)) + data
        case Signal(number):
            return struct.pack(">BI", FrameType.SIGNAL, number)
        case Exit(status):
            return struct.pack(">BI", FrameType.EXIT, status & 0xFFFFFFFF)
        case Resize(height, width):
            return struct.pack(">BHH", FrameType.RESIZE, height & 0xFFFF, width & 0xFFFF)


class ByteSource(Protocol):
    """What the readers below need of a connection."""

    async def readexactly(self, count: int) -> bytes:
        """Return exactly `count` bytes; raises `asyncio.IncompleteReadError` (an `EOFError`) when the peer closes."""
        ...


async def read_server_frame(source: ByteSource) -> ServerFrame | None:
    """Return the next frame the host sent, or None when it has closed the connection between frames."""
    try:
        kind = (await source.readexactly(1))[0]
    except EOFError:
        return None
    match kind:
        case FrameType.SUCCESS:
            return Attached()
        case FrameType.WAITING:
            return Waiting()
        case FrameType.ERROR:
            return Failure((await _counted(source)).decode(errors="replace"))
        case FrameType.DATA:
            return Data(_stream((await source.readexactly(1))[0]), await _counted(source))
        case FrameType.EXIT:
            return Exit(_signed(await source.readexactly(4)))
        case _:
            raise ProtocolViolation(f"unexpected frame type {kind} from the host")


async def read_client_frame(source: ByteSource) -> ClientFrame | None:
    """Return the next frame a client sent, or None when it has closed its side between frames."""
    try:
        kind = (await source.readexactly(1))[0]
    except EOFError:
        return None
    match kind:
        case FrameType.DATA:
            stream = (await source.readexactly(1))[0]
            if stream != Stream.STDIN:
                raise ProtocolViolation(f"a client cannot write to stream {stream}")
            return Data(Stream.STDIN, await _counted(source))
        case FrameType.SIGNAL:
            return Signal(_signed(await source.readexactly(4)))
        case FrameType.RESIZE:
            height, width = struct.unpack(">HH", await source.readexactly(4))
            return Resize(height, width)
        case _:
            raise ProtocolViolation(f"unexpected frame type {kind} from a client")


async def server_frames(source: ByteSource) -> AsyncIterator[ServerFrame]:
    """Iterate over everything the host sends until it closes."""
    while (frame := await read_server_frame(source)) is not None:
        yield frame


async def _counted(source: ByteSource) -> bytes:
    length = int.from_bytes(await source.readexactly(4), "big")
    if length > MAX_FRAME_BYTES:
        raise ProtocolViolation(f"frame of {length} bytes announced, at most {MAX_FRAME_BYTES} allowed")
    return await source.readexactly(length) if length else b""


def _stream(number: int) -> Stream:
    try:
        return Stream(number)
    except ValueError as error:
        raise ProtocolViolation(f"unknown stream {number}") from error


def _signed(raw: bytes) -> int:
    number: int = struct.unpack(">i", raw)[0]
    return number
