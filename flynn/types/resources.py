"""Limits of a job: memory, cpu, disk, descriptors. See spec/host section 10."""

from __future__ import annotations

from flynn.types.codec import Wire

MIB = 1024 * 1024


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
