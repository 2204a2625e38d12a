"""A measurement beside its peer, taken in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

OUTPUT = Path("build/bench.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`ours` and `peer` in `unit`; `ratio` is our cost over the peer's, so lower is better everywhere.

    For throughputs (`unit` ends in `/s`) the ratio is inverted. `budget` is the largest ratio allowed; without a peer
    that can be run here, `peer` is None and the ratio is taken over `limit`, the documented figure, if there is one.
    `against` names the peer.
    """

    name: str
    ours: float
    unit: str
    peer: float | None = None
    limit: float | None = None
    budget: float | None = None
    against: str = ""
    module: str = ""  # filled in by `write`

    @property
    def ratio(self) -> float | None:
        other = self.peer if self.peer is not None else self.limit
        if not other or not self.ours:
            return None
        return other / self.ours if self.unit.endswith("/s") else self.ours / other

    @property
    def missed(self) -> bool:
        """Over its budget."""
        return self.ratio is not None and self.budget is not None and self.ratio > self.budget

    def document(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio}

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `COLUMNS`."""
        peer = self.peer if self.peer is not None else self.limit
        return (
            self.name, _figure(self.ours), _figure(peer), self.unit, self.against, _figure(self.ratio),
            _figure(self.budget), "missed" if self.missed else "",
        )  # fmt: skip


COLUMNS = ("what", "ours", "peer", "unit", "against", "ratio", "budget", "")


def write(module: str, rows: Sequence[Row], path: Path = OUTPUT) -> None:
    """Record a module's rows in place of those of its last run; other modules' stay."""
    kept = [row for row in read(path) if row.module != module] if path.exists() else []
    kept += [replace(row, module=module) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps([row.document() for row in kept], indent=1) + "\n")
    beside.rename(path)


def read(path: Path = OUTPUT) -> list[Row]:
    """Return the rows of the last runs. Raises `FileNotFoundError` before the first one."""
    found = json.loads(path.read_text())
    return [Row(**{key: value for key, value in row.items() if key != "ratio"}) for row in found]


def table(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
