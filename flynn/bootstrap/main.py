"""`flynn-host bootstrap`: run the steps of a manifest against hosts that are up."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from flynn.bootstrap.actions import ACTIONS, Actions, Limits
from flynn.bootstrap.cluster import BootstrapError, Cluster
from flynn.bootstrap.manifest import ManifestError, Step, choose, parse, shipped
from flynn.bootstrap.record import Record
from flynn.bootstrap.template import TemplateError
from flynn.identity import Identity
from flynn.types.artifact import Artifact
from flynn.types.codec import decode, encode
from flynn.types.errors import ApiError

SECRET_ACTIONS = frozenset({"gen-random", "gen-tls-cert"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How to bootstrap.

    `state_dir` is flynn-host's; the record of finished steps and this node's certificate are below it. `images` is a
    directory of `<name>.json` artifacts or one file that maps names to artifacts.
    """

    state_dir: Path
    config_dir: Path
    images: Path
    manifest: bytes = b""
    min_hosts: int = 1
    peer_ips: tuple[str, ...] = ()
    host_timeout: timedelta = timedelta(seconds=120)
    job_timeout: timedelta = timedelta(seconds=60)
    steps: tuple[str, ...] = ()
    json: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


class Reporter(Protocol):
    def start(self, step: Step) -> None: ...
    def done(self, step: Step, data: Mapping[str, Any], *, again: bool) -> None: ...
    def failed(self, step: Step, reason: str) -> None: ...


class TextReporter:
    """Lines for people on standard error; the last result goes to standard output by itself."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def _say(self, text: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S.%f} {text}", file=sys.stderr, flush=True)

    def start(self, step: Step) -> None:
        self._say(f"{step.action} {step.id}")

    def done(self, step: Step, data: Mapping[str, Any], *, again: bool) -> None:
        # Secrets are not printed: they can be read from the record, by root.
        if again:
            self._say(f"{step.action} {step.id} (done before)")
        elif "pin" in data:
            self._say(f"{step.action} {step.id} pin: {data['pin']}")
        elif "message" in data and step.action != "log":
            self._say(f"{step.action} {step.id} {data['message']}")

    def failed(self, step: Step, reason: str) -> None:
        self._say(f"{step.action} {step.id} error: {reason}")


class JsonReporter:
    """One JSON object a line on standard output. Private keys and generated secrets are left out."""

    def _say(self, step: Step, state: str, **more: Any) -> None:
        stamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        line = {"id": step.id, "action": step.action, **more, "state": state, "ts": stamp}
        print(encode(line).decode(), flush=True)

    def start(self, step: Step) -> None:
        self._say(step, "start")

    def done(self, step: Step, data: Mapping[str, Any], *, again: bool) -> None:
        shown = dict(data)
        if step.action in SECRET_ACTIONS:
            shown.pop("key", None)
            shown.pop("data", None)
        if step.action in ("run-app", "add-app", "deploy-app"):
            shown = {"app": data.get("app"), "processes": data.get("processes")}
        self._say(step, "done", **({"data": shown} if shown else {}))

    def failed(self, step: Step, reason: str) -> None:
        self._say(step, "error", error=reason)


def load_images(path: Path) -> dict[str, Artifact]:
    if path.is_dir():
        return {file.stem: decode(file.read_bytes(), Artifact) for file in sorted(path.glob("*.json"))}
    return decode(path.read_bytes(), dict[str, Artifact])


def bootstrap(config: Config) -> int:
    """Run to the end or to the first failure; returns the exit status."""
    reporter: Reporter = JsonReporter() if config.json else TextReporter()
    try:
        return asyncio.run(_bootstrap(config, reporter))
    except (ManifestError, BootstrapError) as error:
        print(f"flynn-host bootstrap: {error}", file=sys.stderr)
    except FileNotFoundError as error:
        print(f"flynn-host bootstrap: {error}; has `flynn-host init` been run?", file=sys.stderr)
    return 1


async def _bootstrap(config: Config, reporter: Reporter) -> int:
    if config.min_hosts == 2:
        raise BootstrapError("the minimum for a multi-node cluster is 3 hosts: two cannot outvote a lost one")
    images = load_images(config.images)
    steps = choose(parse(config.manifest or shipped(), images, tuple(ACTIONS)), config.steps)
    record = Record(config.state_dir / "bootstrap.json")
    cluster = Cluster(
        Identity.load(config.state_dir / "identity"), (config.config_dir / "host.key").read_text().strip()
    )
    try:
        online = Step(id="online-hosts", action="check")
        reporter.start(online)
        await cluster.find_hosts(list(config.peer_ips), config.min_hosts, config.host_timeout)
        reporter.done(online, {}, again=False)
        singleton = config.environment.get("SINGLETON", str(config.min_hosts == 1).lower()) == "true"
        limits = Limits(hosts=config.host_timeout, job=config.job_timeout)
        actions = Actions(cluster, record, config.environment, limits, singleton=singleton)
        return 0 if await run_steps(steps, actions, record, reporter) else 1
    finally:
        await cluster.close()


async def run_steps(steps: Sequence[Step], actions: Actions, record: Record, reporter: Reporter) -> bool:
    """Run the steps that are not done yet, in order; False after the first failure."""
    for step in steps:
        if record.done(step.id):
            actions.restore(step, record.steps[step.id].data)
            reporter.done(step, record.steps[step.id].data, again=True)
            continue
        reporter.start(step)
        try:
            data = await actions.perform(step)
        except (BootstrapError, TemplateError, ApiError, TimeoutError, OSError) as error:
            reporter.failed(step, str(error) or type(error).__name__)
            return False
        record.finish(step.id, data)
        reporter.done(step, data, again=False)
    last = steps[-1]
    if last.action == "log":
        print(record.steps[last.id].data["message"], flush=True)
    return True
