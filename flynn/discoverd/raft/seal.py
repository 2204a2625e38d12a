"""What the members say to each other, encrypted and authenticated: in the place of pysyncobj's Fernet.

Fernet spends more time on base64 and two passes in Python than the rest of a message costs. This is AES-256-GCM with a
key that every process makes for itself, so that a counter is nonce enough:

    salt (16)  time u64  counter u64  ciphertext        the first three are authenticated too

The key is HMAC-SHA256(cluster key, salt). The library checks that times do not go back, and puts a random number of the
receiver into every message, so nothing recorded is believed on another connection.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_HEAD = struct.Struct("!16sQQ")
_NONCE = struct.Struct("!IQ")
_SALT = b"flynn discoverd raft"
_ITERATIONS = 100_000  # the key is a random one usually, but nothing enforces that
MAX_SENDERS = 64  # whose keys are remembered: members, and what they were before they were started again


class NotSealed(ValueError):
    """Not from somebody who has the key, or changed on the way."""


class Seal:
    """Made once per process; the methods are those the library calls."""

    def __init__(self, password: str | bytes) -> None:
        raw = password if isinstance(password, bytes) else password.encode()
        self._master = hashlib.pbkdf2_hmac("sha256", raw, _SALT, _ITERATIONS)
        self._salt = os.urandom(16)
        self._own = self._cipher(self._salt)
        self._counter = itertools.count()
        self._senders: dict[bytes, AESGCM] = {}

    def encrypt_at_time(self, data: bytes, current_time: int) -> bytes:
        number = next(self._counter)
        head = _HEAD.pack(self._salt, current_time, number)
        return head + self._own.encrypt(_NONCE.pack(0, number), data, head)

    def extract_timestamp(self, sealed: bytes) -> int:
        """The time in a message, believed only when `decrypt` has accepted the message."""
        if len(sealed) < _HEAD.size:
            raise NotSealed("too short")
        return int(_HEAD.unpack_from(sealed)[1])

    def decrypt(self, sealed: bytes) -> bytes:
        """Raises NotSealed."""
        if len(sealed) < _HEAD.size:
            raise NotSealed("too short")
        salt, _, number = _HEAD.unpack_from(sealed)
        cipher = self._senders.get(salt) or self._cipher(salt)
        try:
            data = cipher.decrypt(_NONCE.pack(0, number), sealed[_HEAD.size :], sealed[: _HEAD.size])
        except InvalidTag as error:
            raise NotSealed("not sealed with the key of this cluster") from error
        if salt not in self._senders:
            if len(self._senders) >= MAX_SENDERS:
                del self._senders[next(iter(self._senders))]
            self._senders[salt] = cipher
        return data

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self._master, salt, "sha256"))
