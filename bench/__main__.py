"""`make bench`: every row, beside its peer. `python -m bench NAME...` takes only some modules.

`python -m bench --document` measures nothing: it writes the table of the last run into docs/benchmarks.md.
"""

from __future__ import annotations

import importlib
import sys
import traceback

from bench import document
from bench.rows import OUTPUT, Row, read, table, write

MODULES = ("job_start", "host", "discoverd", "overlay", "router", "scheduler", "postgresql", "platform")
"""Each has `rows() -> list[Row]`. The last one measures a development cluster, and boots one if none is up."""


def main() -> int:
    if sys.argv[1:] == ["--document"]:
        document.update(document.PAGE, read())
        print(f"{document.PAGE} shows the figures of {OUTPUT}")
        return 0
    failed = []
    measured: list[Row] = []
    for name in sys.argv[1:] or MODULES:
        print(f"=====> {name}", flush=True)
        try:
            rows = importlib.import_module(f"bench.{name}").rows()
        except Exception:  # One bench that cannot run does not take the others' figures with it.
            traceback.print_exc()
            failed.append(name)
            continue
        measured += rows
        # After each module, and beside what the others measured earlier: an aborted run keeps what it has.
        write(name, rows)
    print(table(measured))
    print(f"written to {OUTPUT}")
    if failed:
        print(f"could not be measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


sys.exit(main())
