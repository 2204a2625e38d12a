"""Counters per service in Prometheus' text format, from what HAProxy counts anyway. Pure.

They begin anew with every reload; whoever collects them knows how to treat a counter that falls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from flynn.router.plan import ServerRef
from flynn.router.stats import CLASSES, ServerStat, service_of

_SUMS: tuple[tuple[str, str, Callable[[ServerStat], int]], ...] = (
    ("sessions_total", "counter", lambda stat: stat.requests),
    ("bytes_out_total", "counter", lambda stat: stat.bytes_out),
    ("connect_failures_total", "counter", lambda stat: stat.connect_failures),
    ("in_flight", "gauge", lambda stat: stat.in_flight),
)


def exposition(stats: Mapping[ServerRef, ServerStat]) -> str:
    by_service: defaultdict[str, list[ServerStat]] = defaultdict(list)
    for ref, stat in stats.items():
        if service := service_of(ref):
            by_service[service].append(stat)
    services = sorted(by_service.items())
    lines = ["# TYPE flynn_router_responses_total counter"]
    for service, group in services:
        for position, name in enumerate(CLASSES):
            count = sum(stat.responses[position] for stat in group)
            lines.append(f'flynn_router_responses_total{{service="{service}",class="{name}"}} {count}')
    for metric, kind, value in _SUMS:
        lines.append(f"# TYPE flynn_router_{metric} {kind}")
        lines += [
            f'flynn_router_{metric}{{service="{service}"}} {sum(value(stat) for stat in group)}'
            for service, group in services
        ]
    up = {(service_of(ref), ref[1]) for ref, stat in stats.items() if not stat.maintenance}  # in several pools, but one
    lines.append("# TYPE flynn_router_backends gauge")
    for service, _ in services:
        lines.append(f'flynn_router_backends{{service="{service}"}} {sum(place[0] == service for place in up)}')
    return "\n".join(lines) + "\n"
