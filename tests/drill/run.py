"""The recovery drill: one fault after another, two witnesses, and how long it took until everything was well again."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from tests.cluster.lab import node
from tests.cluster.lab.cluster import PUBLISHED, Phases, down, up
from tests.cluster.lab.layout import REPO, Node, nodes
from tests.cluster.lab.reach import HOST_API, NoAnswer, ask
from tests.cluster.lab.trio import APP, TrioUser
from tests.drill.faults import CATALOGUE, Fault, Scene, heal
from tests.drill.requests import Asked, RequestWitness
from tests.drill.whole import JOBS, Cluster, NotMet, until
from tests.drill.writes import Refused, WriteWitness

OUT = REPO / "build" / "drill.json"
EVIDENCE = REPO / "build" / "drill"
WHOLE_SECONDS = 180  # the limit of every fault, counted from its end
DETECTION_SECONDS = 12  # the directory drops what is silent for 10 s, routers follow; until then they may try in vain


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of `build/drill.json`."""

    fault: str
    recovered: bool
    seconds_app: float  # from the blow (no node left: from its end) to the last failure through a living node, or 0
    seconds_whole: float  # from the end of the fault until all is as it was, as far as can be checked
    acknowledged_lost: int
    requests_failed: int  # of those sent to nodes that had power and link


@dataclass(frozen=True, slots=True)
class Line:
    """An outcome, and what the table says besides."""

    outcome: Outcome
    requests: int
    late: int  # failed later than a node's loss may be noticed, and not through the node that was hit
    pause: float  # longest time in which no write was confirmed anywhere, in seconds
    whole: bool  # in the end, also if something did not go as promised on the way
    problem: str = ""

    @property
    def survived(self) -> bool:
        return self.outcome.recovered and not self.outcome.acknowledged_lost


HEADER = ("fault", "recovered", "app", "whole", "writes paused", "lost", "failed", "of", "late")


def row(line: Line) -> tuple[str, ...]:
    o = line.outcome
    return (
        o.fault, "yes" if o.recovered else "NO", f"{o.seconds_app:.1f} s", f"{o.seconds_whole:.1f} s",
        f"{line.pause:.1f} s", str(o.acknowledged_lost), str(o.requests_failed), str(line.requests), str(line.late),
    )  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    rows = [HEADER, *map(row, lines)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows)


def markdown(lines: Sequence[Line]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *map(row, lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


class Drill:
    """A cluster with app, database and witnesses, on which faults are tried."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.lines: list[Line] = []
        self._cluster: Cluster | None = None
        self._repository = Path()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f}  {text}", flush=True)

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None, "not set up"
        return self._cluster

    def boot(self) -> None:
        """Have a cluster of three with the app on it, then `set_up`. Raises NotMet."""
        if not all(node.init_pid(member) for member in nodes(3)) or not (PUBLISHED / "env").exists():
            up(3, Phases())
        home = PUBLISHED / "drill"
        home.mkdir(exist_ok=True)
        user = TrioUser(home)
        user.enter_through(nodes(3)[0])
        if not (home / APP).exists():
            self.say("push the app")
            pushed = user.push(user.app(APP, "python"))
            if pushed.returncode != 0:
                raise NotMet(f"the push of the app: {pushed.stdout}{pushed.stderr}")
        self.set_up(user)

    def set_up(self, user: TrioUser) -> None:
        """Give the user's app six jobs and a database, and set the witnesses to work. Raises NotMet."""
        members = tuple(nodes(3))
        self._repository = user.home / APP
        user.flynn("-a", APP, "scale", f"web={JOBS}")
        if "PGHOST=" not in user.flynn("-a", APP, "env"):
            user.flynn("-a", APP, "resource", "add", "postgres")
        credentials = dict(line.partition("=")[::2] for line in user.flynn("-a", APP, "env").splitlines())
        requests = RequestWitness(members, f"{APP}.{user.domain}")
        writes = WriteWitness(members, credentials)
        requests.start()
        writes.start()
        self._cluster = Cluster(members, user, requests, writes)
        until("the cluster is whole before the first fault", self._cluster.missing, WHOLE_SECONDS)
        self.say("whole, witnesses at work")

    def tear_down(self) -> None:
        if self._cluster is not None:
            self._cluster.requests.stop()
            self._cluster.writes.stop()
            self._cluster = None

    def run(self, fault: Fault) -> Line:
        cluster = self.cluster
        self.say(f"===== {fault.name}: {fault.what}")
        scene = Scene(cluster, self.say, self._repository)
        problem = ""
        try:
            fault.procedure(scene)
        except (
            NotMet,
            NoAnswer,
            AssertionError,
            OSError,
            RuntimeError,
            StopIteration,
            subprocess.SubprocessError,
        ) as e:
            problem = f"{type(e).__name__} {e}" if not isinstance(e, NotMet) else str(e)
            self.say(f"NOT AS PROMISED: {problem}")
            self.collect(fault)
            heal(cluster)
        ended = time.monotonic()
        self.say("the fault is over")
        is_whole = True
        try:
            until("whole", MissingAloud(cluster, self.say), WHOLE_SECONDS)
        except NotMet as error:
            is_whole, problem = False, problem or str(error)
            self.say(f"NOT RECOVERED: {error}")
            self.collect(fault)
        whole_at = time.monotonic()
        lost = self._lost()
        line = replace(self._line(fault, scene, ended, whole_at, lost, problem), whole=is_whole)
        self.lines.append(line)
        self.write_down()
        self.say("  ".join(f"{name} {value}" for name, value in zip(HEADER[1:], row(line)[1:], strict=True)))
        return line

    def start_over(self) -> None:
        """Boot the cluster anew, after a fault that it did not survive."""
        self.say("boot the cluster anew")
        self.tear_down()
        down()
        self.boot()

    def _lost(self) -> int:
        try:
            return self.cluster.writes.lost()
        except Refused as error:
            self.say(f"what was written cannot be read: {error}")
            return self.cluster.writes.confirmed()  # nobody can have any of it

    def _line(self, fault: Fault, scene: Scene, ended: float, whole_at: float, lost: int, problem: str) -> Line:
        asked = [one for one in self.cluster.requests.since(scene.struck_at) if one.at <= whole_at]
        failed = [one for one in asked if one.problem]
        late = [one for one in failed if one.at > scene.struck_at + DETECTION_SECONDS and one.node not in scene.victims]
        self._note(fault, scene, failed)
        missed = [one for one in failed if one.at >= self._serving_since(one.node, scene, asked)]
        outcome = Outcome(
            fault=fault.name,
            recovered=not problem,
            seconds_app=round(max((one.answered_at - scene.struck_at for one in missed), default=0.0), 1),
            seconds_whole=round(whole_at - ended, 1),
            acknowledged_lost=lost,
            requests_failed=len(failed),
        )
        pause = self.cluster.writes.longest_pause(scene.struck_at, whole_at)
        return Line(outcome, len(asked), len(late), pause, whole=True, problem=problem)

    @staticmethod
    def _serving_since(member: Node, scene: Scene, asked: Sequence[Asked]) -> float:
        """A node that boots while others serve is not a living one before its router has answered."""
        if member not in scene.booting:
            return scene.struck_at
        return min((one.at for one in asked if one.node == member and not one.problem), default=scene.struck_at)

    def _note(self, fault: Fault, scene: Scene, failed: Sequence[Asked]) -> None:
        """Say why requests failed, and keep the list."""
        reasons = Counter((one.node.id, one.problem) for one in failed)
        for (where, why), count in reasons.most_common(4):
            self.say(f"{count} failed through {where}: {why}")
        EVIDENCE.mkdir(parents=True, exist_ok=True)
        rows = [f"{one.at - scene.struck_at:.2f}\t{one.node.id}\t{one.seconds:.2f}\t{one.problem}\n" for one in failed]
        (EVIDENCE / f"{fault.name}.failed.tsv").write_text("".join(rows))

    def write_down(self) -> None:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps([asdict(line.outcome) for line in self.lines], indent=2) + "\n")

    def collect(self, fault: Fault) -> None:
        """What can be known of each node that is on, in build/drill/<fault>/."""
        directory = EVIDENCE / fault.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for member in self.cluster.members:
            if member.console.exists():
                shutil.copy(member.console, directory / f"{member.id}.console")
            if (member.root / "log").exists():
                shutil.copytree(member.root / "log", directory / f"{member.id}.log", dirs_exist_ok=True)
            for name, port, path in (
                ("jobs", HOST_API, "/host/jobs"), ("services", 1111, "/services"),
                ("standing", 1111, "/.well-known/status"),
                ("postgres", 1111, "/services/postgres/meta"), ("peers", 1111, "/services/postgres/instances"),
            ):  # fmt: skip
                try:
                    (directory / f"{member.id}.{name}.json").write_text(ask(member, port, path).body)
                except (NoAnswer, OSError, subprocess.SubprocessError) as error:
                    (directory / f"{member.id}.{name}.error").write_text(str(error))
        self.say(f"evidence in {directory.relative_to(REPO)}")


class MissingAloud:
    """`Cluster.missing`, saying each new reason once."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None]) -> None:
        self._cluster, self._say, self._last = cluster, say, ""

    def __call__(self) -> str:
        reason = self._cluster.missing()
        if reason and reason != self._last:
            self._say(f"  not yet: {reason[:160]}")
            self._last = reason
        return reason


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__)
    parser.add_argument("--only", default="", help="names of faults in this order, separated by commas; * = anything")
    parser.add_argument("--list", action="store_true", help="say which faults there are")
    options = parser.parse_args(arguments)
    chosen = choose(options.only)
    if options.list:
        for fault in chosen:
            print(f"  {fault.name:<26}{fault.what}")
        return
    drill = Drill()
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    try:
        drill.boot()
        for fault in chosen:
            line = drill.run(fault)
            if not line.whole and fault is not chosen[-1]:
                drill.start_over()
    finally:
        drill.tear_down()
        if drill.lines:
            (EVIDENCE / "table.md").write_text(markdown(drill.lines) + "\n")
            print(table(drill.lines))
    bad = [line for line in drill.lines if not line.survived]
    for line in bad:
        print(f"{line.outcome.fault}: {line.problem or 'acknowledged writes are lost'}")
    print(
        f"{len(drill.lines) - len(bad)} of {len(drill.lines)} faults survived; {OUT.relative_to(REPO)} has the figures"
    )
    sys.exit(1 if bad else 0)


def choose(only: str) -> list[Fault]:
    patterns = [pattern for pattern in only.split(",") if pattern]
    chosen = [f for pattern in patterns or ["*"] for f in CATALOGUE if fnmatch(f.name, pattern)]
    if not chosen:
        sys.exit(f"no fault is called {only!r}; LIST=1 shows their names")
    return chosen
