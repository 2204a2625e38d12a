"""Server-sent events as the original frames them. Pure: bytes in, bytes out.

The original's reader ends an event at the first blank line and does not skip empty events, so a keep-alive is the two
bytes `:\\n` with no blank line after it, and nothing else may add one. The blank after `data:` is required.
"""

from __future__ import annotations

from dataclasses import dataclass

from flynn.types.codec import encode

CONTENT_TYPE = "text/event-stream; charset=utf-8"
KEEP_ALIVE = b":\n"
KEEP_ALIVE_SECONDS = 30.0


def message(value: object, event_id: int | None = None) -> bytes:
    """One message; most streams of the original carry no `id:` line."""
    prefix = b"" if event_id is None else b"id: %d\n" % event_id
    return prefix + b"data: " + encode(value) + b"\n\n"


def error(text: str) -> bytes:
    """The last words of a stream that failed."""
    return b"event: error\ndata: " + " ".join(text.split()).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class Frame:
    event: str  # "" for ordinary messages
    data: bytes
    id: str = ""


class FrameDecoder:
    """Cuts a byte stream into frames; comments and unknown fields are skipped, CRLF is accepted."""

    def __init__(self, limit_bytes: int = 16 * 1024 * 1024) -> None:
        self._buffer = bytearray()
        self._limit = limit_bytes
        self._event, self._data, self._id = "", [], ""  # type: str, list[bytes], str

    def feed(self, chunk: bytes) -> list[Frame]:
        self._buffer += chunk
        frames = []
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > self._limit:
            raise ValueError("an event is larger than the limit")
        self._buffer = bytearray(rest)
        for line in lines:
            frame = self._line(bytes(line).rstrip(b"\r"))
            if frame is not None:
                frames.append(frame)
        return frames

    def _line(self, line: bytes) -> Frame | None:
        if not line:
            frame = Frame(self._event, b"\n".join(self._data), self._id) if self._data else None
            self._event, self._data, self._id = "", [], ""
            return frame
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match field:
            case b"data":
                self._data.append(value)
            case b"event":
                self._event = value.decode("utf-8", "replace")
            case b"id":
                self._id = value.decode("utf-8", "replace")
        return None
