"""Git's packets: `pkt-line` framing and the side band of a push. gitprotocol-common(5), gitprotocol-pack(5). Pure.

The answer to a push is a sequence of packets. With the side band every packet begins with a number: 1 is data for git
(the report of what became of each ref), 2 is progress for the user, 3 a fatal error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FLUSH = b"0000"
MAX_PAYLOAD_BYTES = 65516
PROGRESS = 2
FATAL = 3
SIDE_BAND = b"side-band-64k"


class Malformed(Exception):
    """Not a sequence of packets."""


def packet(payload: bytes) -> bytes:
    """Return one packet."""
    return b"%04x%s" % (len(payload) + 4, payload)


def progress(text: str) -> bytes:
    """Return a packet that git shows to the user behind `remote: `."""
    return packet(bytes([PROGRESS]) + text.encode() + b"\n")


def fatal(text: str) -> bytes:
    """Return a packet that makes the client's git end with this error."""
    return packet(bytes([FATAL]) + text.encode() + b"\n")


def advertisement(service: str) -> bytes:
    """Return what precedes the refs in the answer to `/info/refs`."""
    return packet(f"# service={service}\n".encode()) + FLUSH


def asks_for_side_band(head: bytes) -> bool:
    """Whether the beginning of a push's body asks for the side band: capabilities follow the first command's NUL."""
    position = 0
    while position + 4 <= len(head):
        try:
            length = int(head[position : position + 4], 16)
        except ValueError:
            return False
        if length < 4:
            return False
        _, nul, capabilities = head[position + 4 : position + length].partition(b"\0")
        if nul:
            return SIDE_BAND in capabilities.split()
        position += length
    return False


@dataclass(slots=True)
class ReportHolder:
    """Lets progress pass at once and keeps the rest: git must not report success before the push is saved.

    Everything from the first packet that is not progress is held, and without the side band everything is.
    """

    side_band: bool
    held: bytearray = field(default_factory=bytearray)
    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be sent now."""
        if not self.side_band or self.held:
            self.held += chunk
            return b""
        self._buffer += chunk
        position = 0
        while position + 5 <= len(self._buffer):
            try:
                length = int(self._buffer[position : position + 4], 16)
            except ValueError:
                raise Malformed(f"no packet length: {bytes(self._buffer[position : position + 4])!r}") from None
            if length < 5 or self._buffer[position + 4] != PROGRESS:
                self.held += self._buffer[position:]
                passed = bytes(self._buffer[:position])
                self._buffer.clear()
                return passed
            if position + length > len(self._buffer):
                break
            position += length
        passed = bytes(self._buffer[:position])
        del self._buffer[:position]
        return passed

    def rest(self) -> bytes:
        """Return everything that was held."""
        return bytes(self.held + self._buffer)
