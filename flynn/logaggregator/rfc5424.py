"""Log lines on the wire: RFC 5424 messages in RFC 6587 octet counting. spec/blobstore-logs.md section B3.

    <190>1 2020-01-02T03:04:05.678900Z host1 <app id> web.host1-<uuid> ID1 [flynn seq="42"] hello

Hosts format and send, the aggregator (and any syslog server a user names as sink) reads. Pure. The parser is total: any
bytes give a message or `Malformed`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from sys import intern

import msgspec

PRIORITY = 190  # facility local7, severity informational, for both output streams
MAX_TEXT_BYTES = 10000  # a longer line is sent in pieces
MAX_MESSAGE_BYTES = 11000
MAX_LENGTH_DIGITS = 5


class Malformed(Exception):
    """Not a message of ours; the text says at which part."""


class FramingViolation(Exception):
    """The stream cannot be read any further."""


class Stream(StrEnum):
    """Where a line came from."""

    STDOUT = "stdout"
    STDERR = "stderr"
    INIT = "init"
    UNKNOWN = "unknown"


_STREAMS = {"ID1": Stream.STDOUT, "ID2": Stream.STDERR, "ID3": Stream.INIT}
_MESSAGE_IDS = {stream: message_id for message_id, stream in _STREAMS.items()}


class Message(msgspec.Struct, frozen=True, kw_only=True):  # made for every line, so it has to be cheap
    """One line of one job."""

    time: datetime
    seq: int  # counts in the host's daemon, starts anew when it starts
    host: str
    app: str  # id, empty for jobs without an app
    process: str  # `<type>.<job id>`, or only the job id
    stream: Stream
    text: bytes
    priority: int = PRIORITY

    @property
    def cursor(self) -> tuple[datetime, int]:
        """Orders the messages of one host."""
        return self.time, self.seq

    def process_type(self) -> str:
        return self._split()[0]

    def job_id(self) -> str:
        return self._split()[1]

    def _split(self) -> tuple[str, str]:
        """Job ids begin with the host's id, which may hold dots; a type never does."""
        if self.host and self.process.startswith(f"{self.host}-"):
            return "", self.process
        process_type, dot, job_id = self.process.partition(f".{self.host}-" if self.host else ".")
        if dot and self.host:
            return process_type, f"{self.host}-{job_id}"
        process_type, dot, job_id = self.process.partition(".")
        return (process_type, job_id) if dot else ("", self.process)


def encode(message: Message) -> bytes:
    """Return the message, without framing."""
    stamp = message.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    message_id = _MESSAGE_IDS.get(message.stream, "-")
    head = (
        f"<{message.priority}>1 {stamp} {message.host or '-'} {message.app or '-'} {message.process or '-'} "
        f'{message_id} [flynn seq="{message.seq}"]'
    )
    return head.encode() + (b" " + message.text if message.text else b"")


def frame(message: bytes) -> bytes:
    """Return the message with its length in front."""
    return b"%d %s" % (len(message), message)


_HEADER = re.compile(
    rb"<(\d{1,3})>1 "
    rb"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d) "
    rb"([!-~]{1,255}) ([!-~]{1,255}) ([!-~]{1,255}) ([!-~]{1,32}) "
)
_ELEMENT = re.compile(rb'\[([!#-<>-\\^-~]{1,32})((?: [!#-<>-\\^-~]{1,32}="(?:[^"\\\]]|\\.)*")*)\]', re.DOTALL)
_SEQ = re.compile(rb' seq="(\d{1,20})"')


def decode(raw: bytes) -> Message:
    """Return the message in `raw` (without framing).

    Raises:
        Malformed: another format, or a message without our sequence number.
    """
    found = _HEADER.match(raw)
    if found is None:
        raise Malformed("bad header")
    priority = int(found[1])
    if priority > 191:
        raise Malformed(f"priority {priority} is out of range")
    seq, position = _sequence(raw, found.end())
    if position < len(raw) and raw[position : position + 1] != b" ":
        raise Malformed("no blank before the text")
    host, app, process, message_id = (_word(found[n]) for n in range(10, 14))
    return Message(
        time=_time(found),
        seq=seq,
        host=host,
        app=app,
        process=process,
        stream=_STREAMS.get(message_id, Stream.UNKNOWN),
        text=raw[position + 1 :],
        priority=priority,
    )


class MessageDecoder:
    """Reads the messages of one sender. Lines of one moment and job have all but number and text in common.

    That part is taken apart once; the answers are those of `decode`.
    """

    def __init__(self) -> None:
        self._lead = b""
        self._first: Message | None = None

    def decode(self, raw: bytes) -> Message:
        """As the function. Raises Malformed."""
        start = raw.find(_OUR_ELEMENT) + 1
        first = self._first
        if first is not None and start and raw[:start] == self._lead:
            begin = start + len(_OUR_ELEMENT) - 1
            end = raw.find(b'"]', begin)
            number = raw[begin:end]
            if end >= 0 and len(number) <= 20 and number.isdigit() and raw[end + 2 : end + 3] in (b" ", b""):
                return Message(
                    time=first.time,
                    seq=int(number),
                    host=first.host,
                    app=first.app,
                    process=first.process,
                    stream=first.stream,
                    text=raw[end + 3 :],
                    priority=first.priority,
                )
        message = decode(raw)
        found = _HEADER.match(raw)
        if found is not None and found.end() == start:
            self._lead, self._first = raw[:start], message
        return message


_OUR_ELEMENT = b' [flynn seq="'


def _sequence(raw: bytes, position: int) -> tuple[int, int]:
    """Read the structured data: our sequence number, and where the data ends."""
    seq: int | None = None
    start = position
    while (element := _ELEMENT.match(raw, position)) is not None:
        if element[1] == b"flynn" and (number := _SEQ.search(element[2])) is not None:
            seq = int(number[1])
        position = element.end()
    if position == start:
        raise Malformed("missing structured data")
    if seq is None:
        raise Malformed("missing seq structured data")
    return seq, position


def _time(found: re.Match[bytes]) -> datetime:
    fraction = (found[8] or b"").ljust(6, b"0")[:6]
    try:
        zone = UTC
        if found[9] not in (b"Z", b"z"):
            hours, minutes = int(found[9][:3]), int(found[9][0:1] + found[9][4:])
            zone = timezone(timedelta(hours=hours, minutes=minutes))
        fields = (int(found[n]) for n in range(2, 8))
        return datetime(*fields, int(fraction), tzinfo=zone).astimezone(UTC)  # type: ignore[misc,arg-type]  # six ints
    except (ValueError, OverflowError) as error:
        raise Malformed(f"bad timestamp: {error}") from error


def _word(field: bytes) -> str:
    """A header field; the same few words come again and again, so they are kept once."""
    return "" if field == b"-" else intern(field.decode("ascii"))


class FrameDecoder:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the messages that are complete now.

        Raises:
            FramingViolation: what follows is no length, or too large a one.
        """
        data = self._rest + chunk
        messages: list[bytes] = []
        position = 0
        while (blank := data.find(b" ", position, position + MAX_LENGTH_DIGITS + 1)) >= 0:
            digits = data[position:blank]
            if not digits.isdigit() or int(digits) > MAX_MESSAGE_BYTES:
                raise FramingViolation(f"bad frame length {digits!r}")
            end = blank + 1 + int(digits)
            if end > len(data):
                break
            messages.append(data[blank + 1 : end])
            position = end
        else:
            if len(data) - position > MAX_LENGTH_DIGITS:
                raise FramingViolation("no frame length")
        self._rest = data[position:]
        return messages
