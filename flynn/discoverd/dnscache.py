"""Answers about names outside the zone, kept as long as they say that they may be. Pure: the time comes in as a value.

An answer is kept as the bytes it came in. What is changed when it is given again is what a resolver has to change: the
id, which is the asker's, and the times to live, which have run down meanwhile. RFC 1035 section 7.4, RFC 2308.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

MAX_ENTRIES = 4096
MAX_TTL = 3600  # seconds: a resolver that is wrong for longer than this has to be restarted by somebody
MAX_NEGATIVE_TTL = 60  # "there is no such name" is what people wait to change
_HEADER = 12
_OPT, _SOA = 41, 6
_NOERROR, _NXDOMAIN = 0, 3


@dataclass(frozen=True, slots=True)
class _Kept:
    raw: bytes
    ttl_offsets: tuple[int, ...]
    at: float
    until: float


class Cache:
    """The answers used last; the longest unused ones go when there are too many."""

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def get(self, query: bytes, now: float) -> bytes | None:
        """The answer to a query as it would be given now, with the id of the query."""
        key = key_of(query)
        kept = self._kept.get(key)
        if kept is None or now >= kept.until or now < kept.at:
            self._kept.pop(key, None)
            return None
        self._kept.move_to_end(key)
        answer = bytearray(kept.raw)
        answer[:2] = query[:2]
        age = int(now - kept.at)
        for offset in kept.ttl_offsets:
            (ttl,) = struct.unpack_from("!I", answer, offset)
            struct.pack_into("!I", answer, offset, max(ttl - age, 0))
        return bytes(answer)

    def put(self, query: bytes, answer: bytes, now: float) -> None:
        """Keep an answer, if it is one that may be kept."""
        lifetime, offsets = _lifetime(answer)
        if lifetime <= 0:
            return
        key = key_of(query)
        self._kept[key] = _Kept(answer, offsets, now, now + lifetime)
        self._kept.move_to_end(key)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)


def key_of(query: bytes) -> bytes:
    """All of a query but its id: who asks with other flags or options, or another spelling, asks another thing."""
    return query[2:]


def answers(query: bytes, answer: bytes) -> bool:
    """Whether this can be the answer to that query: the same id and the same question, spelling aside."""
    if len(answer) < _HEADER or answer[:2] != query[:2] or not answer[2] & 0x80:
        return False
    try:
        asked, repeated = query[_HEADER : _question_end(query)], answer[_HEADER : _question_end(answer)]
    except (IndexError, struct.error):
        return False
    return not repeated or asked.lower() == repeated.lower()


def rcode_of(answer: bytes) -> int:
    return answer[3] & 0x0F


def is_cut(answer: bytes) -> bool:
    return bool(answer[2] & 0x02)


def _lifetime(answer: bytes) -> tuple[int, tuple[int, ...]]:
    """Seconds an answer may be kept (0: not at all), and where in it the times to live are."""
    if is_cut(answer) or rcode_of(answer) not in (_NOERROR, _NXDOMAIN):
        return 0, ()
    try:
        records = list(_records(answer))
    except (IndexError, struct.error):
        return 0, ()
    ttls = [ttl for _, _, ttl, _ in records]
    offsets = tuple(offset for _, offset, _, _ in records)
    if rcode_of(answer) == _NOERROR and struct.unpack_from("!H", answer, 6)[0]:
        return min([*ttls, MAX_TTL]), offsets
    # A negative answer lives as long as the zone says in its SOA; without one nobody said that it may be kept.
    says = [min(ttl, minimum) for kind, _, ttl, minimum in records if kind == _SOA]
    return min([*says, *ttls, MAX_NEGATIVE_TTL]) if says else 0, offsets


def _records(answer: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, offset of the time to live, time to live, and for a SOA its minimum, of every record but OPT."""
    count = sum(struct.unpack_from("!HHH", answer, 6))
    at = _question_end(answer)
    for _ in range(count):
        at = _name_end(answer, at)
        kind, _, ttl, length = struct.unpack_from("!HHIH", answer, at)
        end = at + 10 + length
        if end > len(answer):
            raise IndexError("a record that goes on behind the end")
        if kind != _OPT:
            minimum = struct.unpack_from("!I", answer, end - 4)[0] if kind == _SOA and length >= 4 else 0
            yield kind, at + 4, ttl, minimum
        at = end


def _question_end(message: bytes) -> int:
    at = _HEADER
    for _ in range(struct.unpack_from("!H", message, 4)[0]):
        at = _name_end(message, at) + 4
    return at


def _name_end(message: bytes, at: int) -> int:
    while True:
        length = message[at]
        if length >= 0xC0:  # a pointer ends a name
            return at + 2
        at += 1 + length
        if length == 0:
            return at
