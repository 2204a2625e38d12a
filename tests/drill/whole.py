"""What "the platform is whole" means: every reason why it is not, cheap ones first."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.cluster.lab import node
from tests.cluster.lab.layout import Node
from tests.cluster.lab.reach import DISCOVERD_API, HOST_API, NoAnswer, ask, through
from tests.cluster.lab.trio import APP, TrioUser
from tests.drill.requests import RequestWitness
from tests.drill.writes import WriteWitness

JOBS = 6
RUNNING = 1
STALE_SECONDS = 3  # from then on a discoverd calls itself blind
ANSWERS = 40  # through one router, to see every job of the app among them


@dataclass(frozen=True, slots=True)
class Running:
    """A running job, as its host lists it."""

    id: str
    member: Node
    app: str
    type: str
    release: str
    pid: int  # as the node numbers it


class Cluster:
    """The three nodes under the drill, as their operator and their user see them."""

    def __init__(
        self, members: tuple[Node, ...], user: TrioUser, requests: RequestWitness, writes: WriteWitness
    ) -> None:
        self.members, self.user, self.requests, self.writes = members, user, requests, writes
        self._key = user.env["CONTROLLER_KEY"]

    # What the parts say.

    def standing(self, member: Node) -> dict[str, object]:
        """What the node's discoverd says of itself: role, leader, members, how stale it is."""
        said = ask(member, DISCOVERD_API, "/.well-known/status").json()
        return said["data"]["detail"]  # type: ignore[index,no-any-return]

    def jobs(self, member: Node) -> list[Running]:
        listed = ask(member, HOST_API, "/host/jobs?active=true").json()
        assert isinstance(listed, dict)
        found = []
        for job_id, job in listed.items():
            metadata = job["job"].get("metadata") or {}
            if job.get("status") == RUNNING:
                found.append(
                    Running(
                        job_id, member, metadata.get("flynn-controller.app_name", ""),
                        metadata.get("flynn-controller.type", ""), metadata.get("flynn-controller.release", ""),
                        job.get("pid") or 0,
                    )
                )  # fmt: skip
        return found

    def all_jobs(self, among: tuple[Node, ...] | None = None) -> list[Running]:
        return [job for member in among or self.lit for job in self.jobs(member)]

    def job(self, app: str, process: str, member: Node) -> Running:
        found = next((job for job in self.jobs(member) if (job.app, job.type) == (app, process)), None)
        if found is None:
            raise NoAnswer(f"no running job of {app} {process} on {member.id}")
        return found

    def by_id(self, job_id: str) -> Running:
        return next(job for job in self.all_jobs() if job.id == job_id)

    def directory(self, path: str) -> dict[str, object]:
        """A document of the directory, from the first node that is lit."""
        said = ask(self.lit[0], DISCOVERD_API, path)
        if said.status != 200:
            raise NoAnswer(f"{path}: {said.status} {said.body[:200]}")
        document = said.json()
        assert isinstance(document, dict)
        return document

    @property
    def lit(self) -> tuple[Node, ...]:
        """The nodes with power and link."""
        return tuple(member for member in self.members if member not in self.requests.dark)

    def directory_leader(self) -> Node:
        host = str(self.directory("/raft/leader")["host"]).partition(":")[0]
        return next(member for member in self.members if member.ip == host)

    def leading_job(self, service: str) -> Running:
        meta = self.directory(f"/services/{service}/leader")["meta"]
        return self.by_id(meta["FLYNN_JOB_ID"])  # type: ignore[index]

    def database_role(self, role: str) -> Running:
        """The job of the `primary`, the `sync`, or the first `async`."""
        state = self.directory("/services/postgres/meta")["data"]
        peer = state[role][0] if role == "async" else state[role]  # type: ignore[index]
        return self.by_id(peer["meta"]["FLYNN_JOB_ID"])

    def controller(self, path: str, router: Node) -> object:
        url = f"https://controller.{self.user.domain}{path}"
        said = through(router, url, "-u", f":{self._key}")
        if said.status != 200:
            raise NoAnswer(f"controller {path}: {said.status} {said.body[:200]}")
        return said.json()

    def inside(self, member: Node, script: str) -> str:
        """What a shell script prints on a node. Raises NoAnswer if it fails."""
        command, env = node.inside(member, ["sh", "-c", script]), node.command_environment(member)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise NoAnswer(f"{member.id}: {script}: {done.stderr.strip()}")
        return done.stdout

    # What is missing.

    def missing(self) -> str:
        """The first reason why the platform is not whole; nothing if it is. Takes seconds when all is well."""
        try:
            return next(self._reasons(), "")
        except (NoAnswer, AssertionError, KeyError, TypeError, StopIteration, subprocess.SubprocessError) as error:
            return f"{type(error).__name__} {error}" if not isinstance(error, NoAnswer) else str(error)

    def _reasons(self) -> Iterator[str]:
        began = time.monotonic()
        yield from (f"{member.id} is off" for member in self.members if node.init_pid(member) is None)
        yield from self._members_out_of_place()
        yield from filter(None, [self.requests.failing(), self.writes.failing(began - 2)])
        yield from self._database_alone()
        yield from self._status_unhealthy()
        yield from self._counts_wrong()
        yield from self._replication_broken()
        yield from self._directory_silent()
        yield from self._jobs_not_routed()
        yield from self._nothing_new_runs()
        # That took a while, and what was just broken may not have been noticed when it began.
        yield from filter(None, [self.requests.failing(), self.writes.failing(began)])
        yield from self._database_alone()
        yield from self._status_unhealthy()

    def _members_out_of_place(self) -> Iterator[str]:
        standings = {member: self.standing(member) for member in self.members}
        addresses = sorted(f"{member.ip}:{DISCOVERD_API}" for member in self.members)
        leaders = {str(standing.get("leader")) for standing in standings.values()}
        if len(leaders) != 1 or not leaders <= set(addresses):
            yield f"the leader of the directory is {' or '.join(sorted(leaders))}"
        for member, standing in standings.items():
            if sorted(standing["members"]) != addresses or float(str(standing["stale_seconds"])) > STALE_SECONDS:  # type: ignore[call-overload]
                yield f"the directory of {member.id}: {standing}"
        for member in self.members:
            said = ask(member, HOST_API, "/host/status").json()
            if not isinstance(said, dict) or not said.get("network") or not said.get("discoverd"):
                yield f"flynn-host of {member.id} has no network or no directory yet"
        hosts = ask(self.members[0], DISCOVERD_API, "/services/flynn-host/instances").json()
        if not isinstance(hosts, list) or len(hosts) != len(self.members):
            yield f"the directory lists {len(hosts) if isinstance(hosts, list) else hosts} hosts"

    def _database_alone(self) -> Iterator[str]:
        state = self.directory("/services/postgres/meta")["data"]
        assert isinstance(state, dict)
        listed = ask(self.lit[0], DISCOVERD_API, "/services/postgres/instances").json()
        peers = [state.get("primary"), state.get("sync"), *(state.get("async") or [])]
        wanted = len(self.members)
        if len([peer for peer in peers if peer]) != wanted or not isinstance(listed, list) or len(listed) != wanted:
            deposed = len(state.get("deposed") or [])
            yield f"PostgreSQL has {len([p for p in peers if p])} peers in place, {deposed} deposed"

    def _replication_broken(self) -> Iterator[str]:
        """Every peer has to receive from the one above it: who is listed only is of no use when the next one dies."""
        asked = self.members[-1]
        said = json.loads(self.inside(asked, "flynn-host database status --json"))
        peers = {peer["status"]["peer"]["role"]: peer["status"] for peer in said if peer.get("status")}
        for upper, lower in itertools.pairwise(("primary", "sync", "async")):
            if not {upper, lower} <= set(peers):
                yield f"PostgreSQL has no {upper} or no {lower} that answers"
            elif peers[upper]["peer"]["id"] not in (peers[lower]["database"].get("connected") or []):
                yield f"PostgreSQL's {lower} does not receive from the {upper}"

    def _status_unhealthy(self) -> Iterator[str]:
        for member in self.members:
            said = through(member, f"http://status.{self.user.domain}/", "-H", "Accept: application/json").json()
            data = said["data"]  # type: ignore[index]
            if data["status"] != "healthy":
                bad = {name: part for name, part in data["detail"].items() if part["status"] != "healthy"}
                yield f"status page: {json.dumps(bad)}"

    def _counts_wrong(self) -> Iterator[str]:
        """What runs on the hosts, what the controller believes, and what the formations ask for must be the same."""
        formations = self.controller("/formations?active=true", self.members[0])
        recorded = self.controller("/active-jobs", self.members[-1])
        assert isinstance(formations, list) and isinstance(recorded, list)
        wanted: Counter[tuple[str, str, str]] = Counter()
        names = {}
        for formation in formations:
            names[formation["app"]["id"]] = formation["app"]["name"]
            for process, count in (formation.get("processes") or {}).items():
                omni = formation["release"]["processes"].get(process, {}).get("omni", False)
                counted = count * (len(self.members) if omni else 1)
                wanted[formation["app"]["name"], process, formation["release"]["id"]] += counted
        wanted = +wanted
        kept = {(app, process) for app, process, _ in wanted}  # and not builds and other one-off jobs
        on_hosts = Counter(
            (job.app, job.type, job.release) for job in self.all_jobs(self.members) if (job.app, job.type) in kept
        )
        on_record = Counter(
            (names.get(job["app"], job["app"]), job["type"], job["release"])
            for job in recorded
            if job["state"] == "up" and (names.get(job["app"]), job.get("type")) in kept
        )
        for where, found in (("running", on_hosts), ("on record as up", on_record)):
            for key in sorted((found - wanted) | (wanted - found)):
                yield f"{key[0]} {key[1]}: {found[key]} {where}, {wanted[key]} wanted"
        if wanted_of_app := {key: count for key, count in wanted.items() if key[0] == APP and key[1] == "web"}:
            if sum(wanted_of_app.values()) != JOBS:
                yield f"{APP} is scaled to {sum(wanted_of_app.values())}"
        else:
            yield f"{APP} has no formation"

    def _directory_silent(self) -> Iterator[str]:
        for member in self.members:
            if problem := self.unwritable(member):
                yield problem

    def unwritable(self, member: Node) -> str:
        """Why the directory does not take a write through a node; nothing if it does."""
        name = f"drill-{member.id}-{time.monotonic_ns()}"
        made = ask(member, DISCOVERD_API, f"/services/{name}", method="PUT", body="{}")
        if made.status != 200:
            return f"a write to the directory through {member.id}: {made.status} {made.body[:200]}"
        ask(member, DISCOVERD_API, f"/services/{name}", method="DELETE")
        return ""

    def _jobs_not_routed(self) -> Iterator[str]:
        for member in self.members:
            found: set[str] = set()
            for _ in range(ANSWERS):
                said = through(member, f"http://{APP}.{self.user.domain}/", seconds=3)
                if said.status != 200:
                    yield f"the app through {member.id}: {said.status}"
                found.add(said.body.split()[-1])
                if len(found) == JOBS:
                    break
            if len(found) != JOBS:
                yield f"{len(found)} jobs answer through {member.id}"

    def _nothing_new_runs(self) -> Iterator[str]:
        done = self.user.run("flynn", "-a", APP, "run", "echo", "works", timeout=60)
        if done.stdout != "works\n":
            yield f"flynn run: {done.stdout}{done.stderr}".strip()


class NotMet(Exception):
    """Something that a fault's story promises did not happen; says what."""


def until(what: str, missing: Callable[[], str], seconds: float, every: float = 0.3) -> None:
    """Wait until `missing()` says nothing. Raises NotMet with its last word."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            reason = missing()
        except (NoAnswer, AssertionError, KeyError, TypeError, StopIteration, subprocess.SubprocessError) as error:
            reason = f"{type(error).__name__} {error}"
        if not reason:
            return
        if time.monotonic() > deadline:
            raise NotMet(f"{what}: not within {seconds:.0f} s: {reason}")
        time.sleep(every)
