"""Limits of a job: memory, cpu, disk, descriptors. See spec/host section 10."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flynn.types.codec import Wire

MIB = 1024 * 1024
IN_BYTES = ("memory", "temp_disk")
SETTABLE = ("memory", "cpu", "temp_disk", "max_fd")  # by users
_VALUE = re.compile(r"(\d+(?:\.\d+)*) ?([kKmMgGtTpP]?)[bB]?")
_UNITS = "kmgtp"


class BadLimit(ValueError):
    """What was written is no limit."""


class Limit(Wire):
    request: int | None = None
    limit: int | None = None


Resources = dict[str, Limit]
"""Keyed `memory` (bytes), `cpu` (thousandths of a core), `temp_disk` (bytes), `max_fd`, `max_procs` (counts)."""

DEFAULTS: Resources = {
    "memory": Limit(request=1024 * MIB, limit=1024 * MIB),
    "cpu": Limit(request=1000, limit=1000),
    "temp_disk": Limit(request=100 * MIB, limit=100 * MIB),
    "max_fd": Limit(request=10000, limit=10000),
}


def with_defaults(resources: Resources | None) -> Resources:
    """Fill in what is missing: a limit from the defaults, a request from the limit."""
    result: Resources = {}
    for name in {**DEFAULTS, **(resources or {})}:
        given = (resources or {}).get(name) or Limit()
        default = DEFAULTS.get(name)
        limit = given.limit if given.limit is not None else (default.limit if default else None)
        request = given.request if given.request is not None else limit
        if limit is not None or request is not None:
            result[name] = Limit(request=request, limit=limit)
    return result


def parse_limits(words: Sequence[str]) -> Resources:
    """Read `memory=512MB`, `max_fd=12k`: each as a limit without a request. Raises `BadLimit`."""
    parsed: Resources = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise BadLimit(f'invalid resource limit: "{word}"')
        if name not in SETTABLE:
            raise BadLimit(f'invalid resource limit type: ["{name}" "{value}"]')
        parsed[name] = Limit(limit=parse_amount(name, value))
    return parsed


def parse_amount(name: str, value: str) -> int:
    """Read a number with a unit: multiples of 1024 for what is measured in bytes, of 1000 otherwise."""
    found = _VALUE.fullmatch(value)
    try:
        number = float(found[1]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        raise BadLimit(f'invalid resource limit value: "{value}"')
    base = 1024 if name in IN_BYTES else 1000
    return int(number * base ** (_UNITS.index(found[2].lower()) + 1 if found[2] else 0))
