"""The peer of flynn-host: containers of plain runc on a directory, without network; with conmon when it keeps a log."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STARTED = ("/bin/sh", "-c", "echo; exec /bin/sleep 1000")
"""A process that says that it runs, and stays."""


def write_bundle(bundle: Path, root: Path, arguments: Sequence[str]) -> Path:
    """Make an OCI bundle whose process shares the network of its caller."""
    bundle.mkdir()
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["args"] = list(arguments)
    config["process"]["terminal"] = False
    config["process"].pop("rlimits", None)
    config["root"] = {"path": str(root), "readonly": True}
    config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/sys"]
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def run(bundle: Path, number: int) -> float:
    """Run a container to its end; milliseconds."""
    begin = time.perf_counter()
    subprocess.run(["runc", "run", "--bundle", bundle, name(number)], check=True, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - begin) * 1000


def name(number: int) -> str:
    return f"flynn-bench-{os.getpid()}-{number}"


@contextmanager
def started(bundle: Path, number: int, *, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """A container whose output is a pipe. Removed at the end, with what runs in it."""
    process = subprocess.Popen(
        ["runc", "run", "--bundle", bundle, name(number)], stdin=stdin, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        remove(number)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait(30)


def remove(number: int) -> None:
    subprocess.run(["runc", "delete", "--force", name(number)], check=False, capture_output=True)


@contextmanager
def logged(bundle: Path, number: int, work: Path, log: Path) -> Iterator[tuple[int, Path]]:
    """A created container whose output conmon writes to `log` with a stamp per line, as Podman and CRI-O have it.

    Gives conmon's process id and the file that appears when the container has ended; `runc start` is the caller's.
    """
    ended = work / "exits"
    ended.mkdir(exist_ok=True)
    pid_file = work / f"conmon-{number}.pid"
    subprocess.run(
        [
            "conmon", "--cid", name(number), "--cuuid", name(number), "--name", name(number),
            "--runtime", "/usr/sbin/runc", "--bundle", str(bundle), "--persist-dir", str(work), "--full-attach",
            "--container-pidfile", str(work / "container.pid"), "--conmon-pidfile", str(pid_file),
            "--exit-dir", str(ended), "--socket-dir-path", str(work), "--log-path", f"k8s-file:{log}",
        ],
        check=True, cwd=bundle, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while _status(number) != "created":
            if time.monotonic() > deadline:
                raise RuntimeError("conmon has not created its container")
            time.sleep(0.02)
        yield int(pid_file.read_text()), ended / name(number)
    finally:
        remove(number)


def _status(number: int) -> str:
    found = subprocess.run(["runc", "state", name(number)], check=False, capture_output=True, text=True)
    return str(json.loads(found.stdout)["status"]) if found.returncode == 0 else ""
