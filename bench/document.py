"""The table of figures in docs/benchmarks.md, between two markers."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.rows import COLUMNS, OUTPUT, Row

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- figures: written by python -m bench --document -->", "<!-- end of figures -->"


def update(page: Path, rows: Sequence[Row]) -> None:
    """Write the rows into the page. Raises `LookupError` when it has no place for them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LookupError(f"no markers in {page}")
    page.write_text(f"{before}{BEGIN}\n{_machine()}\n\n{markdown(rows)}\n{END}{after}")


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per row."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _machine() -> str:
    measured = datetime.fromtimestamp(OUTPUT.stat().st_mtime, UTC)
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return (
        f"Measured {measured:%Y-%m-%d} on {os.cpu_count()} cores ({model[1] if model else platform.machine()}), "
        f"{round(int(memory[1]) / (1 << 20)) if memory else '?'} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}."
    )
