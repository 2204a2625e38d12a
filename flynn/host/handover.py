"""What one daemon hands to the next that takes its process over: listening sockets, and the way back.

    FLYNN_HOST_HANDOVER   {"listeners": {name: descriptor}, "back": [program, arguments...], ...}

The sockets stay open from one program to the other, so who connects meanwhile waits instead of being refused. ADR 8.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from flynn.types.codec import Wire, decode, encode
from flynn.types.errors import ApiError
from flynn.types.host import HostUpdate

HANDOVER = "FLYNN_HOST_HANDOVER"
BACKLOG = 512  # connections that wait while nobody accepts them


class Handover(Wire):
    """`back`: the program that was here before, for as long as the new one is not ready; empty if there is none."""

    listeners: dict[str, int] = {}
    back: list[str] = []
    environment: dict[str, str] = {}  # of `back`
    update: HostUpdate | None = None

    def into(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the next program."""
        return {**environ, HANDOVER: encode(self).decode()}

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Handover:
        """Take what was handed over out of the environment; from now on no child inherits the sockets."""
        text = environ.pop(HANDOVER, "")
        if not text:
            return cls()
        try:
            handover = decode(text.encode(), cls)
        except ApiError:
            return cls()
        for descriptor in handover.listeners.values():
            os.set_inheritable(descriptor, False)
        return handover


class Listeners:
    """The daemon's listening sockets, by name. Those who serve get duplicates: closing one does not refuse anybody."""

    def __init__(self, inherited: Mapping[str, int]) -> None:
        self._sockets = {name: socket.socket(fileno=descriptor) for name, descriptor in inherited.items()}

    def open(self, name: str, host: str, port: int) -> socket.socket:
        """Return a listening socket for this address: the one handed over, if it is bound to it. Raises `OSError`."""
        kept = self._sockets.get(name)
        if kept is None or kept.getsockname()[:2] != (host, port):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            if kept is not None:
                kept.close()
            self._sockets[name] = kept = socket.create_server((host, port), family=family, backlog=BACKLOG)
        return kept.dup()

    def hand_over(self) -> dict[str, int]:
        """Let the next program have them; returns their descriptors."""
        for listener in self._sockets.values():
            listener.set_inheritable(True)
        return {name: listener.fileno() for name, listener in self._sockets.items()}
