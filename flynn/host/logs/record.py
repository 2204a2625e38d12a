"""One log line as RFC 5424 message in RFC 6587 framing, and lines out of chunks. Pure.

151 <190>1 2020-01-02T03:04:05.678900Z host1 <app id> web.host1-<uuid> ID1 [flynn seq="42"] hello
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec

from flynn.host.attach import Stream

MAX_LINE_BYTES = 10_000
PRIORITY = b"<190>1"  # local7.info, version 1
MESSAGE_IDS = {Stream.STDOUT: b"ID1", Stream.STDERR: b"ID2", Stream.INIT_LOG: b"ID3"}
_STREAMS = {message_id: stream for stream, message_id in MESSAGE_IDS.items()}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Cursor = tuple[int, int]
"""Place of a line in the order of all lines of a host: microseconds since 1970, and a sequence number."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a line comes from; constant for a job."""

    host_id: str
    app_id: str
    process_type: str
    job_id: str

    def header(self) -> bytes:
        """Return HOSTNAME, APP-NAME and PROCID."""
        process = f"{self.process_type}.{self.job_id}" if self.process_type else self.job_id
        return f"{self.host_id or '-'} {self.app_id or '-'} {process}".encode()


class Record(msgspec.Struct, frozen=True, gc=False):  # made for every line, so it has to be cheap
    """A line read back. `message` is the whole RFC 5424 message without framing."""

    cursor: Cursor
    app_id: bytes
    process: bytes  # `type.job` or `job`
    stream: Stream | None
    text: bytes
    message: bytes

    def of_job(self, job_id: bytes) -> bool:
        return self.process == job_id or self.process.endswith(b"." + job_id)


def encode(header: bytes, stream: Stream, cursor: Cursor, text: bytes) -> bytes:
    """Return the framed record of one line, with the newline that follows each record on disk."""
    return encode_all(header, stream, cursor, [text])


def encode_all(header: bytes, stream: Stream, first: Cursor, texts: Sequence[bytes]) -> bytes:
    """Return the records of lines that were read together: at the same moment, numbered from the first one's on."""
    moment, number = first
    digits = len(str(number))
    if len(texts) > 1 and len(str(number + len(texts) - 1)) > digits:  # rare: 99, 100
        same = 10**digits - number
        rest = encode_all(header, stream, (moment, number + same), texts[same:])
        return encode_all(header, stream, first, texts[:same]) + rest
    lead = b'%s %s %s %s [flynn seq="' % (PRIORITY, timestamp(moment), header, MESSAGE_IDS[stream])
    empty = len(lead) + digits + len('"]')
    return b"".join(
        [
            b'%d %s%d"] %s\n' % (empty + 1 + len(text), lead, n, text) if text else b'%d %s%d"]\n' % (empty, lead, n)
            for n, text in enumerate(texts, number)
        ]
    )


class Decoder:
    """Reads the lines of a log file. What neighbours have in common (all but number and text) is taken apart once."""

    def __init__(self) -> None:
        self._lead: bytes | None = None
        self._moment = 0
        self._app_id, self._process = b"", b""
        self._stream: Stream | None = None

    def decode(self, line: bytes) -> Record | None:
        """Read one line; None when it is damaged (cut off by a crash) or not one of ours."""
        length, _, message = line.partition(b" ")
        if not length.isdigit() or int(length) != len(message):
            return None
        lead, found, rest = message.partition(b' [flynn seq="')
        number, quote, text = rest.partition(b'"]')
        if not found or not quote or not number.isdigit() or (lead != self._lead and not self._take_apart(lead)):
            return None
        return Record((self._moment, int(number)), self._app_id, self._process, self._stream, text[1:], message)

    def _take_apart(self, lead: bytes) -> bool:
        parts = lead.split(b" ")
        if len(parts) != 6 or parts[0] != PRIORITY:
            return False
        moment = microseconds(parts[1])
        if moment is None:
            return False
        self._lead, self._moment, self._app_id, self._process = lead, moment, parts[3], parts[4]
        self._stream = _STREAMS.get(parts[5])
        return True


def decode(line: bytes) -> Record | None:
    """Read a single line, see `Decoder`."""
    return Decoder().decode(line)


def timestamp(moment: int) -> bytes:
    """Format microseconds since 1970 as UTC with exactly six decimals."""
    return (_EPOCH + timedelta(microseconds=moment)).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()


def microseconds(stamp: bytes) -> int | None:
    """Read a timestamp back."""
    try:
        moment = datetime.fromisoformat(stamp.decode("ascii"))
    except ValueError:
        return None
    return (moment - _EPOCH) // timedelta(microseconds=1) if moment.tzinfo else None


class LineSplitter:
    """Cuts chunks into lines of at most `MAX_LINE_BYTES`; the newline is dropped, a carriage return stays."""

    def __init__(self, beginning: bytes = b"") -> None:
        self._rest = beginning

    @property
    def rest(self) -> bytes:
        """The beginning of the next line."""
        return self._rest

    def feed(self, chunk: bytes) -> list[bytes]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if max(map(len, lines), default=0) > MAX_LINE_BYTES:
            lines = [piece for line in lines for piece in pieces(line)]
        while len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]
        return lines

    def finish(self) -> list[bytes]:
        """Return the last line if it had no newline."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def pieces(line: bytes) -> list[bytes]:
    """Return a line in parts of at most `MAX_LINE_BYTES`; at least one, which may be empty."""
    return [line[start : start + MAX_LINE_BYTES] for start in range(0, max(len(line), 1), MAX_LINE_BYTES)]
