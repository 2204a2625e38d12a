"""Partitions: shares of the machine's CPU for the platform, background work and users. spec/host.md section 10."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_PARTITIONS = "system=cpu_shares:4096 background=cpu_shares:4096 user=cpu_shares:8192"
MANDATORY = ("system", "background", "user")
DEFAULT_PARTITION = "user"


class BadPartitions(ValueError):
    """The `--partitions` flag does not make sense."""


class InvalidPartition(Exception):
    """A job names a partition the host does not have."""


def parse(text: str) -> dict[str, int]:
    """Read `name=cpu_shares:n name=...` into shares by name; the three mandatory ones must be there."""
    partitions: dict[str, int] = {}
    for item in text.split():
        name, _, settings = item.partition("=")
        key, _, value = settings.partition(":")
        if not name or key != "cpu_shares" or not value.isdigit() or int(value) < 2:
            raise BadPartitions(f"invalid partition {item!r}: want name=cpu_shares:n with n of at least 2")
        partitions[name] = int(value)
    for name in MANDATORY:
        if name not in partitions:
            raise BadPartitions(f"the partition {name} is missing")
    return partitions


def choose(name: str, partitions: Mapping[str, int]) -> str:
    """Return the partition of a job that asks for `name` (empty: user). Raises `InvalidPartition`."""
    chosen = name or DEFAULT_PARTITION
    if chosen not in partitions:
        raise InvalidPartition(f'host: invalid job partition "{name}"')
    return chosen
