"""The node's bridge: made once, brought to the wanted state at every call."""

from __future__ import annotations

from ipaddress import IPv4Interface


def ensure_bridge(name: str, address: IPv4Interface, mtu: int) -> None:
    """Create or adjust the bridge in the current network namespace: address, mtu, up; turn IPv4 forwarding on.

    Other IPv4 addresses are removed. Idempotent; takes a few ms, mostly the kernel's.
    """
    raise NotImplementedError


def remove_bridge(name: str) -> None:
    """Remove it if it is there (for tests and `flynn-host` uninstall)."""
    raise NotImplementedError
