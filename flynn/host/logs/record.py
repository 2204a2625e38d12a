"""One log line as RFC 5424 message in RFC 6587 framing, and lines out of chunks. Pure.

151 <190>1 2020-01-02T03:04:05.678900Z host1 <app id> web.host1-<uuid> ID1 [flynn seq="42"] hello
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

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


@dataclass(frozen=True, slots=True)
class Record:
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
    stamp, number = timestamp(cursor[0]), cursor[1]
    message = b'%s %s %s %s [flynn seq="%d"]' % (PRIORITY, stamp, header, MESSAGE_IDS[stream], number)
    if text:
        message += b" " + text
    return b"%d %s\n" % (len(message), message)


def decode(line: bytes) -> Record | None:
    """Read one line of a log file; None when it is damaged (cut off by a crash) or not one of ours."""
    length, _, message = line.partition(b" ")
    if not length.isdigit() or int(length) != len(message):
        return None
    parts = message.split(b" ", 6)
    if len(parts) != 7 or parts[0] != PRIORITY:
        return None
    _, stamp, _, app_id, process, message_id, rest = parts
    if not rest.startswith(b'[flynn seq="'):
        return None
    number, quote, text = rest[12:].partition(b'"]')
    moment = microseconds(stamp)
    if not quote or not number.isdigit() or moment is None:
        return None
    return Record((moment, int(number)), app_id, process, _STREAMS.get(message_id), text[1:], message)


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
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        lines: list[bytes] = []
        for line in whole:
            if len(line) > MAX_LINE_BYTES:
                lines += pieces(line)
            else:
                lines.append(line)
        while len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]
        return lines

    def finish(self) -> list[bytes]:
        """Return the last line if it had no newline."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def pieces(line: bytes) -> list[bytes]:
    return [line[start : start + MAX_LINE_BYTES] for start in range(0, len(line), MAX_LINE_BYTES)]
