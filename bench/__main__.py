"""`make bench`: every row, beside its peer. `python -m bench NAME...` takes only some modules."""

from __future__ import annotations

import importlib
import sys
import traceback

from bench.rows import OUTPUT, Row, table, write

MODULES = ("job_start", "router", "scheduler", "platform")
"""Each has `rows() -> list[Row]`. The last one measures a development cluster, and boots one if none is up."""


def main() -> int:
    rows: list[Row] = []
    failed = []
    for name in sys.argv[1:] or MODULES:
        print(f"=====> {name}", flush=True)
        try:
            rows += importlib.import_module(f"bench.{name}").rows()
        except Exception:  # One bench that cannot run does not take the others' figures with it.
            traceback.print_exc()
            failed.append(name)
    write(rows)
    print(table(rows))
    print(f"written to {OUTPUT}")
    if failed:
        print(f"could not be measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


sys.exit(main())
