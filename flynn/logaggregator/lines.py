"""Log lines as JSON: what `flynn log` reads, byte for byte. spec/blobstore-logs.md section B8.1. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from flynn.logaggregator.rfc5424 import Message, Stream


class _Line(msgspec.Struct, omit_defaults=True):
    """The keys in the order in which clients have always seen them."""

    host_id: str = ""
    job_id: str = ""
    msg: str = ""
    process_type: str = ""
    source: str = msgspec.field(default_factory=lambda: "app")
    stream: str = msgspec.field(default_factory=lambda: "")
    timestamp: str = msgspec.field(default_factory=lambda: "")


_ESCAPES = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)
_encoder = msgspec.json.Encoder()


def line(message: Message) -> bytes:
    """Return one message as a line of JSON."""
    raw = _encoder.encode(
        _Line(
            host_id=message.host,
            job_id=message.job_id(),
            msg=message.text.decode("utf-8", "replace"),
            process_type=message.process_type(),
            stream=str(message.stream),
            timestamp=stamp(message.time),
        )
    )
    for character, escape in _ESCAPES:
        if character in raw:
            raw = raw.replace(character, escape)  # outside of strings JSON has none of these
    return raw + b"\n"


def missed(count: int, now: datetime) -> bytes:
    """Return the line that tells a follower it was too slow."""
    notice = f"{count} lines were dropped here: the reader was too slow"
    raw = _encoder.encode(_Line(msg=notice, stream=str(Stream.INIT), timestamp=stamp(now)))
    return raw + b"\n"


def stamp(time: datetime) -> str:
    """Return RFC 3339 in UTC, with as many decimals as are needed."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S")
    return text + (f".{time.microsecond:06d}".rstrip("0") if time.microsecond else "") + "Z"
