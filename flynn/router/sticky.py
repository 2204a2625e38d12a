"""The value of the `_backend` cookie: base64 of a nonce and a NaCl secretbox of the backend's address. See spec 8.3.

The original drew a random nonce per response. Here the nonce follows from key and address, so that one backend has one
cookie on all routers for ever: HAProxy can then keep stickiness with two map look-ups. The format is the original's,
whose routers read our cookies. XSalsa20 is written out because no library that we have anyway offers it; it runs once
per sticky backend, never per request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

KEY_BYTES = 32
_NONCE_BYTES = 24
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_MASK = 0xFFFFFFFF
_P1305 = (1 << 130) - 5


def cookie_value(key: bytes, addr: str) -> str:
    nonce = hmac.digest(key, b"flynn sticky " + addr.encode(), hashlib.sha256)[:_NONCE_BYTES]
    return base64.b64encode(nonce + seal(key, nonce, addr.encode())).decode()


def address_in(key: bytes, cookie: str) -> str | None:
    """The address in a cookie of ours or of an original router; None unless it is authentic."""
    try:
        raw = base64.b64decode(cookie, validate=True)
    except ValueError:
        return None
    opened = unseal(key, raw[:_NONCE_BYTES], raw[_NONCE_BYTES:])
    return None if opened is None else opened.decode("ascii", "replace")


def seal(key: bytes, nonce: bytes, message: bytes) -> bytes:
    """NaCl crypto_secretbox: tag, then ciphertext."""
    stream = _xsalsa20(key, nonce, 32 + len(message))
    sealed = bytes(a ^ b for a, b in zip(message, stream[32:], strict=True))
    return _poly1305(stream[:32], sealed) + sealed


def unseal(key: bytes, nonce: bytes, box: bytes) -> bytes | None:
    if len(nonce) != _NONCE_BYTES or len(box) < 16:
        return None
    tag, sealed = box[:16], box[16:]
    stream = _xsalsa20(key, nonce, 32 + len(sealed))
    if not hmac.compare_digest(_poly1305(stream[:32], sealed), tag):
        return None
    return bytes(a ^ b for a, b in zip(sealed, stream[32:], strict=True))


def _rotated(value: int, by: int) -> int:
    value &= _MASK
    return (value << by | value >> (32 - by)) & _MASK


def _rounds(state: list[int]) -> list[int]:
    x = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        x[b] ^= _rotated(x[a] + x[d], 7)
        x[c] ^= _rotated(x[b] + x[a], 9)
        x[d] ^= _rotated(x[c] + x[b], 13)
        x[a] ^= _rotated(x[d] + x[c], 18)

    for _ in range(10):
        for column in ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)):
            quarter(*column)
        for row in ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)):
            quarter(*row)
    return x


def _state(key: tuple[int, ...], middle: tuple[int, ...]) -> list[int]:
    return [_SIGMA[0], *key[:4], _SIGMA[1], *middle, _SIGMA[2], *key[4:], _SIGMA[3]]


def _xsalsa20(key: bytes, nonce: bytes, length: int) -> bytes:
    mixed = _rounds(_state(struct.unpack("<8I", key), struct.unpack("<4I", nonce[:16])))
    subkey = tuple(mixed[i] for i in (0, 5, 10, 15, 6, 7, 8, 9))
    tail = struct.unpack("<2I", nonce[16:])
    stream = b""
    for block in range(-(-length // 64)):
        start = _state(subkey, (*tail, block & _MASK, block >> 32))
        stream += struct.pack("<16I", *((a + b) & _MASK for a, b in zip(start, _rounds(start), strict=True)))
    return stream[:length]


def _poly1305(key: bytes, message: bytes) -> bytes:
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for start in range(0, len(message), 16):
        total = (total + int.from_bytes(message[start : start + 16] + b"\1", "little")) * r % _P1305
    return ((total + int.from_bytes(key[16:], "little")) & ((1 << 128) - 1)).to_bytes(16, "little")
