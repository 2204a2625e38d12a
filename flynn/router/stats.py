"""What HAProxy says about its servers, as values. Pure."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flynn.router.plan import ServerRef

Place = tuple[str, str]
"""Service and address."""

CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")


@dataclass(frozen=True, slots=True)
class ServerStat:
    in_flight: int = 0
    maintenance: bool = False
    requests: int = 0
    bytes_out: int = 0
    connect_failures: int = 0
    responses: tuple[int, ...] = (0,) * len(CLASSES)


def parse(text: str) -> dict[ServerRef, ServerStat]:
    """The answer to `show stat`, servers only."""

    def number(row: Mapping[str, str], column: str) -> int:
        return int(row.get(column) or 0)

    return {
        (row["pxname"], row["svname"]): ServerStat(
            in_flight=number(row, "scur"),
            maintenance=(row["status"] or "").startswith("MAINT"),
            requests=number(row, "stot"),
            bytes_out=number(row, "bout"),
            connect_failures=number(row, "econ"),
            responses=tuple(number(row, f"hrsp_{name}") for name in CLASSES),
        )
        for row in csv.DictReader(io.StringIO(text.removeprefix("# ")))
        if row.get("svname") not in (None, "", "FRONTEND", "BACKEND")
    }


def service_of(ref: ServerRef) -> str:
    """The service of a pool such as `http:shop-web:leader` or `raw:http:controller`; empty for pools of no service."""
    parts = ref[0].removeprefix("raw:").split(":")
    return parts[1] if len(parts) > 1 else ""


def in_flight(stats: Mapping[ServerRef, ServerStat]) -> dict[Place, int]:
    """Requests and streams per service and address, over all pools of the service."""
    counted: Counter[Place] = Counter()
    for ref, stat in stats.items():
        if service := service_of(ref):
            counted[service, ref[1].removesuffix(".tls")] += stat.in_flight
    return dict(counted)
