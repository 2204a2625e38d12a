"""What a full reconcile costs: 1,000 hosts whose 10,000 jobs all have to be placed, and then all be found in place.

No peer runs here; the limit is the second that DESIGN allows. Everything happens in the engine: no I/O, no simulation.
"""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random

from bench.rows import Row, table
from flynn.scheduler.engine import SWEEP_EVERY, Engine
from flynn.scheduler.events import (
    FormationReceived,
    FormationsListed,
    HostSeen,
    JobsListed,
    LeadershipChanged,
    RecordsListed,
    StartJob,
    Tick,
    VolumesRecorded,
)
from flynn.scheduler.model import Formation, HostID
from flynn.types.app import App
from flynn.types.release import ProcessType, Release

HOSTS, APPS, JOBS_PER_TYPE = 1000, 1000, 5
LIMIT_SECONDS = 1.0
RUNS = 5
START = datetime(2026, 1, 1, tzinfo=UTC)


def measure() -> tuple[float, float]:
    """Seconds to place everything, and to go over everything once more when nothing is missing."""
    ids = count()
    engine = Engine(Random(1), lambda: f"u{next(ids)}")
    hosts = [HostSeen(HostID(f"h{n}"), {"zone": str(n % 3)}) for n in range(HOSTS)]
    processes = {"web": ProcessType(), "worker": ProcessType()}
    formations = tuple(
        Formation(
            app=App(id=f"a{n}", name=f"app{n}"),
            release=Release(id="r", processes=processes),
            wanted=dict.fromkeys(processes, JOBS_PER_TYPE),
            tags={"worker": {"zone": str(n % 3)}},
            updated_at=START,
        )
        for n in range(APPS)
    )
    engine.step([*hosts, *map(FormationReceived, formations), LeadershipChanged(True)], START)
    engine.step([FormationsListed(formations, START), RecordsListed((), START), VolumesRecorded()], START)
    engine.step([JobsListed(host.host, (), START) for host in hosts[1:]], START)
    began = time.perf_counter()
    actions = engine.step([JobsListed(hosts[0].host, (), START)], START)  # the last thing it has waited for
    placing = time.perf_counter() - began
    assert sum(isinstance(action, StartJob) for action in actions) == APPS * len(processes) * JOBS_PER_TYPE
    began = time.perf_counter()
    assert not any(isinstance(action, StartJob) for action in engine.step([Tick()], START + SWEEP_EVERY + timedelta(1)))
    return placing, time.perf_counter() - began


def rows() -> list[Row]:
    placing, sweeping = (statistics.median(times) for times in zip(*(measure() for _ in range(RUNS)), strict=True))
    name = f"scheduler: {HOSTS:,} hosts, {APPS * 2 * JOBS_PER_TYPE:,} jobs"
    return [
        Row(
            name=f"{name}, all to be placed",
            ours=placing,
            unit="s",
            limit=LIMIT_SECONDS,
            budget=1.0,
            against="the limit",
        ),
        Row(
            name=f"{name}, all in place", ours=sweeping, unit="s", limit=LIMIT_SECONDS, budget=1.0, against="the limit"
        ),
    ]


if __name__ == "__main__":
    print(table(rows()))
