"""What a scheduler has done and has to do, as text for Prometheus. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from flynn.scheduler.engine import Engine
from flynn.scheduler.model import JobState

COUNTED = {
    "starts": "requests to hosts to start a job",
    "failed_starts": "of these, refused or not answered",
    "ends": "jobs that ended without having been asked to",
    "stops": "requests to hosts to stop a job",
    "moves": "jobs started to take the place of one on a fuller host",
    "ups": "jobs that came up",
    "up_seconds": "from their creation until they were up, in sum",
}


def exposition(engine: Engine, *, queued: int, untold: int) -> str:
    """`queued`: events not looked at yet. `untold`: updates that the controller has not taken yet."""
    jobs = engine.world.jobs.values()
    states = Counter(job.state for job in jobs)
    reasons = Counter(job.reason for job in jobs if job.state is JobState.BLOCKED)
    hosts = Counter(
        "shutting_down" if host.shutting_down else "healthy" if host.healthy else "suspect"
        for host in engine.world.hosts.values()
    )
    lines = [
        *_family("leads", "gauge", "whether this one leads", [({}, int(bool(engine.leader)))]),
        *_family("settled", "gauge", "whether all is listed that a leader has to know", [({}, int(engine.settled))]),
        *_family("events_queued", "gauge", "events not looked at yet", [({}, queued)]),
        *_family("updates_untold", "gauge", "updates the controller has not taken yet", [({}, untold)]),
        *_family("hosts", "gauge", "hosts by state", [({"state": name}, hosts[name]) for name in sorted(hosts)]),
        *_family("jobs", "gauge", "jobs by state", [({"state": state.value}, states[state]) for state in JobState]),
        *_family(
            "jobs_blocked", "gauge", "by what they wait for", [({"reason": r}, n) for r, n in sorted(reasons.items())]
        ),
    ]
    for name, meaning in COUNTED.items():
        lines += _family(f"{name}_total", "counter", meaning, [({}, engine.counts.get(name, 0))])
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> list[str]:
    full = f"flynn_scheduler_{name}"
    lines = [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{full}{{{shown}}} {value:g}" if shown else f"{full} {value:g}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
