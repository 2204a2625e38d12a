"""A measurement beside its peer, taken in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OUTPUT = Path("build/bench.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`ours` and `peer` in `unit`; `ratio` is our cost over the peer's, so lower is better everywhere.

    For throughputs (`unit` ends in `/s`) the ratio is inverted. `budget` is the largest ratio allowed; without a peer
    that can be run here, `peer` is None and the ratio is taken over `limit`, the documented figure, if there is one.
    """

    name: str
    ours: float
    unit: str
    peer: float | None = None
    limit: float | None = None
    budget: float | None = None

    @property
    def ratio(self) -> float | None:
        other = self.peer if self.peer is not None else self.limit
        if not other or not self.ours:
            return None
        return other / self.ours if self.unit.endswith("/s") else self.ours / other

    def document(self) -> dict[str, object]:
        fields = asdict(self)
        fields.pop("limit")
        return {**fields, "ratio": self.ratio}


def write(rows: Sequence[Row], path: Path = OUTPUT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps([row.document() for row in rows], indent=1) + "\n")
    beside.rename(path)


def table(rows: Sequence[Row]) -> str:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    lines = [("what", "ours", "peer", "unit", "ratio", "budget", "")]
    for row in rows:
        missed = row.ratio is not None and row.budget is not None and row.ratio > row.budget
        peer = row.peer if row.peer is not None else row.limit
        lines.append(
            (
                row.name, figure(row.ours), figure(peer), row.unit, figure(row.ratio), figure(row.budget),
                "missed" if missed else "",
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
