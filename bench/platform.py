"""What the whole platform costs on one node: memory, the time of a bootstrap, of a push, of a release change.

Boots a fresh development cluster (and leaves it, as `make cluster` does); the images must have been built.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from bench import processes
from bench.rows import Row
from tests.cluster.lab import node
from tests.cluster.lab.cluster import Phases, environment, flynn, up
from tests.cluster.lab.layout import REPO, Node

K3S_MB = 1600.0  # documented memory of a k3s server, which cannot be run here
SHIM_MB = 10.0  # containerd-shim, one per container
BOOTSTRAP_SECONDS = 60.0
PUSH_SECONDS = 10.0  # a push of a small app on Heroku-like platforms


def rows() -> list[Row]:
    phases = Phases()
    up(1, phases)
    bootstrap = phases.seconds["bootstrap"]
    push, again = _pushes()
    return [
        Row(
            name="bootstrap of one node, images present",
            ours=bootstrap,
            limit=BOOTSTRAP_SECONDS,
            unit="s",
            budget=1.0,
            against="the limit",
        ),
        Row(name="first push of a Python app", ours=push, unit="s"),
        Row(
            name="push of an unchanged app",
            ours=again,
            limit=PUSH_SECONDS,
            unit="s",
            budget=1.0,
            against="Heroku-like platforms",
        ),
        *_memory(),
    ]


def _memory() -> list[Row]:
    """Sum of PSS of everything in the node, and of one container's init."""
    total = 0.0
    inits = []
    first = node.init_pid(Node(0))
    for pid in processes.below(first) if first is not None else ():
        pss = _pss_mb(pid)
        total += pss
        if _name(pid) == "flynn-init":
            inits.append(pss)
    found = [
        Row(
            name="one idle node, all system apps, sum of PSS",
            ours=total,
            limit=K3S_MB,
            unit="MB",
            budget=0.625,
            against="k3s server, documented",
        )
    ]
    if inits:
        found.append(
            Row(
                name="init memory per container (PSS)",
                ours=sum(inits) / len(inits),
                limit=SHIM_MB,
                unit="MB",
                budget=0.8,
                against="containerd-shim, documented",
            )
        )
    return found


def _pss_mb(pid: int) -> float:
    try:
        return processes.pss_mb(pid)
    except (OSError, LookupError):
        return 0.0  # it has ended meanwhile, or is a thread of the kernel


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _pushes() -> tuple[float, float]:
    """Seconds of a first push, and of a second one that changes nothing but the commit."""
    env = environment()
    work = Path(tempfile.mkdtemp(prefix="flynn-bench-"))
    name = f"bench-{int(time.time())}"
    git = ["git", "-C", str(work / "app"), "-c", "user.name=bench", "-c", "user.email=bench@example.com"]
    seconds = []
    try:
        shutil.copytree(REPO / "tests" / "apps" / "python", work / "app")
        subprocess.run([*git, "init", "-q", "-b", "master"], check=True)
        subprocess.run([*git, "add", "-A"], check=True)
        flynn("create", "--yes", name, cwd=str(work / "app"))
        for message in ("one", "two"):
            subprocess.run([*git, "commit", "-qm", message, "--allow-empty"], check=True)
            began = time.monotonic()
            subprocess.run([*git, "push", "-q", "flynn", "master"], check=True, env=env, timeout=600)
            seconds.append(time.monotonic() - began)
    finally:
        flynn("-a", name, "delete", "--yes", check=False)
        shutil.rmtree(work, ignore_errors=True)
    return seconds[0], seconds[1]
