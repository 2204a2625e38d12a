"""What jobs use, in the format of Prometheus. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from flynn.types.host import META_APP, META_APP_NAME, META_TYPE, ActiveJob, JobStats, JobStatus

GAUGES: tuple[tuple[str, str, Callable[[JobStats], float]], ...] = (
    ("flynn_host_job_memory_bytes", "gauge", lambda stats: stats.memory_bytes),
    ("flynn_host_job_cpu_seconds_total", "counter", lambda stats: stats.cpu_seconds),
    ("flynn_host_job_processes", "gauge", lambda stats: stats.processes),
    ("flynn_host_job_oom_kills_total", "counter", lambda stats: stats.oom_kills),
)


def exposition(jobs: Iterable[ActiveJob], running: Iterable[tuple[ActiveJob, JobStats]], launching: int) -> str:
    """Return how many listed jobs there are of each status, and what each running one uses."""
    statuses = Counter(job.status for job in jobs)
    lines = ["# TYPE flynn_host_jobs gauge"]
    lines += [f'flynn_host_jobs{{status="{status.name.lower()}"}} {statuses[status]}' for status in JobStatus]
    lines += ["# TYPE flynn_host_jobs_launching gauge", f"flynn_host_jobs_launching {launching}"]
    measured = [(_labels(job), stats) for job, stats in running]
    for name, kind, value in GAUGES:
        lines.append(f"# TYPE {name} {kind}")
        lines += [f"{name}{labels} {value(stats)}" for labels, stats in measured]
    return "\n".join(lines) + "\n"


def _labels(job: ActiveJob) -> str:
    meta = job.job.metadata
    pairs = {
        "job": job.job.id,
        "app": meta.get(META_APP, ""),
        "app_name": meta.get(META_APP_NAME, ""),
        "type": meta.get(META_TYPE, ""),
    }
    return "{" + ",".join(f'{name}="{_quoted(value)}"' for name, value in pairs.items()) + "}"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
