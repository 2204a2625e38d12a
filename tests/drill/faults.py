"""The faults: each is a short story of what happens to the nodes, from blow to relief, in words an operator knows.

A procedure returns when the fault is over; that everything is well again afterwards is checked by whoever runs it. What
has to hold *while* it lasts is said in the procedure, by `until`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.lab import cluster as lab
from tests.cluster.lab import network, node
from tests.cluster.lab.layout import Node
from tests.cluster.lab.reach import HOST_API, NoAnswer, ask
from tests.cluster.lab.trio import APP
from tests.drill.whole import JOBS, STALE_SECONDS, Cluster, NotMet, Running, until

CARRIED_SECONDS = 60  # within which the others have taken over everything from a node that is gone
OFF_SECONDS = 20  # longer than the directory keeps what does not report (10 s)
CUT_SECONDS = 30
STOP_SECONDS = 25
PUSHED_SECONDS = 90  # within which a disturbed push can be repeated: the lock of the dead one runs out after 30 s
FILLER = "filler"  # what fills a node's disk


@dataclass(slots=True)
class Scene:
    """One fault in progress: what it is done to, and when it struck whom."""

    cluster: Cluster
    say: Callable[[str], None]
    repository: Path
    struck_at: float = field(default_factory=time.monotonic)
    victims: set[Node] = field(default_factory=set)
    booting: set[Node] = field(default_factory=set)  # have got their power back while others served

    def strike(self, *victims: Node) -> None:
        """The blow falls now, on these nodes."""
        self.struck_at = time.monotonic()
        self.victims.update(victims)

    def signal(self, job: Running, name: str) -> None:
        """Signal the daemon of a job itself, below the first process of its container."""
        self.cluster.inside(job.member, f"kill -{name} $(cat /proc/{job.pid}/task/{job.pid}/children)")

    def kill(self, *jobs: Running) -> None:
        self.say(", ".join(f"{job.app} {job.type} on {job.member.id}" for job in jobs))
        self.strike(*(job.member for job in jobs))
        for job in jobs:
            self.signal(job, "KILL")

    def host_pid(self, member: Node) -> int:
        said = ask(member, HOST_API, "/host/status").json()
        assert isinstance(said, dict)
        return int(said["pid"])

    @contextmanager
    def dark(self, *members: Node) -> Iterator[None]:
        """Nobody is asked on these nodes meanwhile, and the user goes in through another."""
        requests, writes = self.cluster.requests, self.cluster.writes
        requests.dark = writes.dark = requests.dark | set(members)
        if self.cluster.lit:
            self.cluster.user.enter_through(self.cluster.lit[0])
        try:
            yield
        finally:
            requests.dark = writes.dark = requests.dark - set(members)
            self.cluster.user.enter_through(self.cluster.lit[0])

    def carried_by_the_others(self) -> str:
        """What those that are left do not do yet; nothing if they carry the app and its database."""
        cluster = self.cluster
        jobs = [job for job in cluster.all_jobs() if (job.app, job.type) == (APP, "web")]
        if len(jobs) < JOBS:
            return f"{len(jobs)} jobs of the app on the nodes that are left"
        if problem := cluster.requests.failing(last=12) or cluster.writes.failing(self.struck_at + 1):
            return problem
        return next(filter(None, map(cluster.unwritable, cluster.lit)), "")

    def wait_carried(self, began: float, at_least: float) -> None:
        until("the others carry on", self.carried_by_the_others, CARRIED_SECONDS)
        self.say(f"carried by the others after {time.monotonic() - began:.1f} s")
        time.sleep(max(0.0, began + at_least - time.monotonic()))  # the fault itself has to last

    def power_on(self, *members: Node) -> None:
        if set(self.cluster.lit):
            self.booting.update(members)
        for member in members:
            network.plug_in(member)
            node.switch_on(member)


Procedure = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    what: str
    procedure: Procedure


CATALOGUE: list[Fault] = []


def fault(name: str, what: str) -> Callable[[Procedure], Procedure]:
    def enter(procedure: Procedure) -> Procedure:
        CATALOGUE.append(Fault(name, what, procedure))
        return procedure

    return enter


@contextmanager
def no_job_ends(jobs: Callable[[], list[Running]]) -> Iterator[None]:
    """What happens to flynn-host in the block is nothing that its jobs notice. Raises NotMet."""
    before = {job.id for job in jobs()}
    yield
    if gone := before - {job.id for job in jobs()}:
        raise NotMet(f"jobs ended with their daemon: {', '.join(sorted(gone))}")


# A daemon is killed.


def _killed(name: str, what: str, *choose: Callable[[Cluster], Running | list[Running]]) -> None:
    def procedure(scene: Scene) -> None:
        for chosen in [each(scene.cluster) for each in choose]:
            scene.kill(*(chosen if isinstance(chosen, list) else [chosen]))

    fault(name, what)(procedure)


def _all_of(app: str, process: str) -> Callable[[Cluster], list[Running]]:
    def find(cluster: Cluster) -> list[Running]:
        found = [job for job in cluster.all_jobs() if (job.app, job.type) == (app, process)]
        if not found:
            raise NoAnswer(f"no job of {app} {process} runs")
        return found

    return find


def _one_of(app: str, process: str) -> Callable[[Cluster], Running]:
    return lambda cluster: _all_of(app, process)(cluster)[0]


def _discoverd_of(cluster: Cluster, leading: bool) -> Running:
    leader = cluster.directory_leader()
    member = leader if leading else next(m for m in reversed(cluster.members) if m != leader)
    return cluster.job("discoverd", "app", member)


_killed("kill-discoverd-leader", "the leader of the directory is killed", lambda c: _discoverd_of(c, True))
_killed("kill-discoverd-follower", "another member of the directory is killed", lambda c: _discoverd_of(c, False))
_killed("kill-flannel", "a node's flannel is killed", _one_of("flannel", "app"))
_killed("kill-router", "a node's router is killed, HAProxy with it", _one_of("router", "app"))
_killed("kill-controller", "every web process of the controller is killed at once", _all_of("controller", "web"))
_killed("kill-scheduler-leader", "the scheduler that leads is killed", lambda c: c.leading_job("controller-scheduler"))
_killed("kill-workers", "every worker of the controller is killed at once", _all_of("controller", "worker"))
_killed("kill-blobstore", "every blobstore is killed at once", _all_of("blobstore", "web"))
_killed("kill-gitreceive", "every gitreceive is killed at once", _all_of("gitreceive", "app"))
_killed("kill-logaggregator", "every logaggregator is killed at once", _all_of("logaggregator", "app"))
_killed("kill-status", "every status page is killed at once", _all_of("status", "web"))
_killed("kill-postgres-primary", "the daemon of the primary is killed", lambda c: c.database_role("primary"))
_killed("kill-postgres-sync", "the daemon of the sync is killed", lambda c: c.database_role("sync"))
_killed("kill-postgres-async", "the daemon of the async is killed", lambda c: c.database_role("async"))
_killed("kill-postgres-api", "every provider of databases is killed at once", _all_of("postgres", "web"))
_killed("kill-app-jobs", "all six jobs of the app are killed at once", _all_of(APP, "web"))


@fault("kill-postgres-server", "the primary's server is killed, its daemon lives")
def _(scene: Scene) -> None:
    primary = scene.cluster.database_role("primary")
    child = f"$(cat /proc/{primary.pid}/task/{primary.pid}/children)"
    scene.say(f"on {primary.member.id}")
    scene.strike(primary.member)
    scene.cluster.inside(primary.member, f"d={child}; kill -KILL $(pgrep -x -P $d postgres)")


@fault("kill-haproxy", "HAProxy is killed on a node, the router's daemon lives")
def _(scene: Scene) -> None:
    member = scene.cluster.members[1]
    scene.strike(member)
    scene.cluster.inside(
        member, "kill -KILL $(pgrep -x haproxy) || true"
    )  # the worker goes with its master, maybe before its turn


@fault("kill-zygote", "the process that starts containers is killed on a node")
def _(scene: Scene) -> None:
    member = scene.cluster.members[2]
    scene.strike(member)
    scene.cluster.inside(member, "kill -KILL $(pgrep -x flynn-zygote)")
    of_app = [job for job in scene.cluster.jobs(member) if job.app == APP]
    scene.kill(*of_app[:1])  # so that a new one is needed at once


@fault("kill-host", "flynn-host is killed on a node")
def _(scene: Scene) -> None:
    member = scene.cluster.members[0]
    with no_job_ends(lambda: scene.cluster.jobs(member)):
        pid = scene.host_pid(member)
        scene.strike(member)
        scene.cluster.inside(member, f"kill -KILL {pid}")
        until("flynn-host comes back", lambda: "" if scene.host_pid(member) != pid else "the same process", 30)


@fault("kill-every-host", "flynn-host is killed on all nodes at once")
def _(scene: Scene) -> None:
    members = scene.cluster.members
    with no_job_ends(scene.cluster.all_jobs):
        pids = {member: scene.host_pid(member) for member in members}
        scene.strike(*members)
        for member in members:
            scene.cluster.inside(member, f"kill -KILL {pids[member]}")
        for member in members:
            until("flynn-host comes back", lambda m=member: "" if scene.host_pid(m) != pids[m] else "the same", 30)  # type: ignore[misc]


@fault("restart-hosts", "flynn-host is restarted in place, node by node")
def _(scene: Scene) -> None:
    with no_job_ends(scene.cluster.all_jobs):
        scene.strike(*scene.cluster.members)
        for member in scene.cluster.members:
            pid = scene.host_pid(member)
            scene.cluster.inside(member, f"kill -TERM {pid}")
            until("flynn-host comes back", lambda m=member, p=pid: "" if scene.host_pid(m) != p else "the same", 40)  # type: ignore[misc]


@fault("update-hosts", "flynn-host is updated in place, node by node")
def _(scene: Scene) -> None:
    with no_job_ends(scene.cluster.all_jobs):
        scene.strike(*scene.cluster.members)
        for member in scene.cluster.members:
            pid, last = scene.host_pid(member), _last_update(member)
            said = ask(member, HOST_API, "/host/update", method="POST", body="{}", seconds=60)
            if said.status != 200:
                raise NotMet(f"{member.id} refuses the update: {said.status} {said.body[:300]}")
            until("the update is over", lambda m=member, u=last: "" if _last_update(m) != u else "not yet", 60)  # type: ignore[misc]
            if (update := _last_update(member)).get("error") or scene.host_pid(member) != pid:
                raise NotMet(f"the update of {member.id}: {update.get('error') or 'another process'}")


def _last_update(member: Node) -> dict[str, str]:
    said = ask(member, HOST_API, "/host/status").json()
    assert isinstance(said, dict)
    return said.get("update") or {}


# A daemon is stopped for a while: it keeps its connections and says nothing.


def _stopped(name: str, what: str, choose: Callable[[Cluster], Running], carried: bool) -> None:
    def procedure(scene: Scene) -> None:
        job = choose(scene.cluster)
        scene.say(f"{job.app} {job.type} on {job.member.id}, {STOP_SECONDS} s")
        scene.strike(job.member)
        # The whole container: a database's server is a child of its daemon.
        scene.cluster.inside(job.member, f"kill -STOP $(pgrep --ns {job.pid} --nslist pid)")
        try:
            if carried:
                until("the others carry on", scene.carried_by_the_others, STOP_SECONDS - 5)
                scene.say(f"carried by the others after {time.monotonic() - scene.struck_at:.1f} s")
            time.sleep(max(0.0, scene.struck_at + STOP_SECONDS - time.monotonic()))
        finally:
            scene.cluster.inside(job.member, f"kill -CONT $(pgrep --ns {job.pid} --nslist pid)")

    fault(name, what)(procedure)


_stopped(
    "stop-discoverd-leader",
    "the leader of the directory stands still for 25 s",
    lambda c: _discoverd_of(c, True),
    False,
)
_stopped(
    "stop-postgres-primary",
    "the primary, server and daemon, stands still for 25 s",
    lambda c: c.database_role("primary"),
    True,
)
_stopped(
    "stop-scheduler-leader",
    "the scheduler that leads stands still for 25 s",
    lambda c: c.leading_job("controller-scheduler"),
    False,
)


@fault("stop-host", "flynn-host stands still on a node for 25 s")
def _(scene: Scene) -> None:
    member = scene.cluster.members[1]
    pid = scene.host_pid(member)
    scene.strike(member)
    scene.cluster.inside(member, f"kill -STOP {pid}")
    try:
        time.sleep(STOP_SECONDS)
    finally:
        scene.cluster.inside(member, f"kill -CONT {pid}")


# A node is cut off from everybody.


def _cut_off(scene: Scene, member: Node) -> None:
    scene.say(f"{member.id}, {CUT_SECONDS} s")
    with scene.dark(member):
        scene.strike(member)
        network.cut(member)
        try:
            scene.wait_carried(scene.struck_at, CUT_SECONDS)
        finally:
            network.mend(member)


def _cut(name: str, what: str, choose: Callable[[Cluster], Node]) -> None:
    def procedure(scene: Scene) -> None:
        _cut_off(scene, choose(scene.cluster))

    fault(name, what)(procedure)


for number in range(3):
    _cut(f"cut-node{number + 1}", f"node {number + 1} is cut off for 30 s", lambda c, n=number: c.members[n])  # type: ignore[misc]
_cut("cut-directory-leader", "the node that leads the directory is cut off for 30 s", lambda c: c.directory_leader())
_cut(
    "cut-primary", "the node with PostgreSQL's primary is cut off for 30 s", lambda c: c.database_role("primary").member
)


@fault(
    "kill-primary-of-rejoined", "a node with the primary was cut off for 30 s; the next one dies as it is taken back"
)
def _(scene: Scene) -> None:
    former = scene.cluster.database_role("primary").member
    _cut_off(scene, former)
    until(
        "the former primary is taken back", lambda: _without_async(scene.cluster, former), CARRIED_SECONDS, every=0.05
    )
    scene.kill(scene.cluster.database_role("primary"))


def _without_async(cluster: Cluster, former: Node) -> str:
    if float(str(cluster.standing(former)["stale_seconds"])) > STALE_SECONDS:
        return f"{former.id} does not know what the others have decided"
    state = cluster.directory("/services/postgres/meta")["data"]
    return "" if state.get("async") else "PostgreSQL has no async"  # type: ignore[attr-defined]


@fault("cut-all", "every node is cut off from every other for 20 s")
def _(scene: Scene) -> None:
    members = scene.cluster.members
    with scene.dark(*members[1:]):  # somebody has to be lit; nobody is asked
        scene.cluster.requests.dark = scene.cluster.writes.dark = frozenset(members)
        scene.strike(*members)
        try:
            for member in members:
                network.cut(member)
            time.sleep(20)
        finally:
            for member in members:
                network.mend(member)
            scene.cluster.requests.dark = scene.cluster.writes.dark = frozenset(members[1:])
    scene.strike()  # what the app does when the links are back is what counts


# During a deploy, a push.


def _deploying(scene: Scene, number: int) -> subprocess.Popen[str]:
    user = scene.cluster.user
    return subprocess.Popen(
        ["flynn", "-a", APP, "env", "set", f"DRILL={number}"],
        env=user.env, cwd=user.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def _outcome(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # git has children, which hold its output
        process.communicate()
        raise NotMet(f"{' '.join(map(str, process.args))}: no end within {seconds:.0f} s") from error  # type: ignore[arg-type]
    return process.returncode, " ".join(said.split())


def _finish_deploy(scene: Scene, deploying: subprocess.Popen[str], seconds: float = 180) -> None:
    """A deploy that was disturbed either goes through or says that it does not; the next one goes through."""
    code, said = _outcome(deploying, seconds)
    scene.say(f"the deploy ended with {code} after {time.monotonic() - scene.struck_at:.1f} s: {said[-150:]}")
    if code != 0:
        code, said = _outcome(_deploying(scene, time.monotonic_ns()), seconds)
        if code != 0:
            raise NotMet(f"a deploy after the fault: {said[-300:]}")


def _deploy_begun(scene: Scene) -> str:
    """Wait for the moment in which the new release's jobs are being started."""
    releases = {job.release for job in scene.cluster.all_jobs() if (job.app, job.type) == (APP, "web")}
    return "" if len(releases) > 1 else "only jobs of one release"


def _killed_in_a_deploy(name: str, what: str, choose: Callable[[Cluster], list[Running]]) -> None:
    def procedure(scene: Scene) -> None:
        victims = choose(scene.cluster)  # looked up before: a deploy does not take long
        deploying = _deploying(scene, time.monotonic_ns())
        until("the deploy begins", lambda: _deploy_begun(scene), 20, every=0.01)
        scene.kill(*victims)
        if deploying.poll() is not None:
            raise NotMet("the deploy had ended before the blow fell")
        _finish_deploy(scene, deploying)

    fault(name, what)(procedure)


_killed_in_a_deploy(
    "deploy-scheduler-killed",
    "during a deploy the scheduler that leads is killed",
    lambda c: [c.leading_job("controller-scheduler")],
)
_killed_in_a_deploy(
    "deploy-workers-killed", "during a deploy every worker of the controller is killed", _all_of("controller", "worker")
)


@fault("deploy-power", "during a deploy a node loses its power")
def _(scene: Scene) -> None:
    leading = scene.cluster.leading_job("controller-scheduler").member
    with scene.dark(leading):
        deploying = _deploying(scene, time.monotonic_ns())
        until("the deploy begins", lambda: _deploy_begun(scene), 20, every=0.05)
        scene.say(f"{leading.id}, where the scheduler leads")
        scene.strike(leading)
        node.power_cut(leading)
        _finish_deploy(scene, deploying)
        scene.wait_carried(scene.struck_at, OFF_SECONDS)
        scene.power_on(leading)


def _pushing(scene: Scene) -> subprocess.Popen[str]:
    scene.cluster.user.commit(scene.repository, f"drill {time.monotonic_ns()}")
    return _push_again(scene)


def _push_again(scene: Scene) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["git", "push", "flynn", "master"],
        env=scene.cluster.user.env, cwd=scene.repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def _building(scene: Scene) -> str:
    jobs = [job for member in scene.cluster.lit for job in _one_offs(member)]
    return "" if jobs else "no build job runs"


def _one_offs(member: Node) -> list[str]:
    listed = ask(member, HOST_API, "/host/jobs?active=true").json()
    assert isinstance(listed, dict)
    return [
        name
        for name, job in listed.items()
        if (job["job"].get("metadata") or {}).get("flynn-controller.type", "") in ("", "slugbuilder")
    ]


def _finish_push(scene: Scene, pushing: subprocess.Popen[str]) -> None:
    """A push that was disturbed goes through, or fails and can be repeated."""
    code, said = _outcome(pushing, 240)
    scene.say(f"the push ended with {code} after {time.monotonic() - scene.struck_at:.1f} s: {said[-150:]}")
    deadline = time.monotonic() + PUSHED_SECONDS
    while code != 0:
        if time.monotonic() > deadline:
            raise NotMet(f"a push after the fault: {said[-500:]}")
        time.sleep(1)  # with every gitreceive gone, there is nobody to ask for a moment
        code, said = _outcome(_push_again(scene), 240)
        scene.say(f"the push was repeated: {code}, after {time.monotonic() - scene.struck_at:.1f} s")


@fault("push-gitreceive-killed", "during a push every gitreceive is killed; the push is repeated")
def _(scene: Scene) -> None:
    pushing = _pushing(scene)
    until("the build begins", lambda: _building(scene), 40, every=0.05)
    scene.kill(*_all_of("gitreceive", "app")(scene.cluster))
    _finish_push(scene, pushing)


@fault("push-power", "during a push the node that builds loses its power; the push is repeated")
def _(scene: Scene) -> None:
    pushing = _pushing(scene)
    until("the build begins", lambda: _building(scene), 40, every=0.05)
    builder = next((member for member in scene.cluster.members if _one_offs(member)), scene.cluster.members[2])
    with scene.dark(builder):
        scene.say(builder.id)
        scene.strike(builder)
        node.power_cut(builder)
        _finish_push(scene, pushing)
        scene.wait_carried(scene.struck_at, OFF_SECONDS)
        scene.power_on(builder)


# A disk is full.


@fault("disk-full", "the disk of the node with PostgreSQL's primary is full for 30 s")
def _(scene: Scene) -> None:
    member = scene.cluster.database_role("primary").member
    filler = member.root / FILLER
    scene.say(member.id)
    scene.strike(member)
    try:
        _fill(filler)
        until("the host says what is wrong", lambda: "" if _disk_trouble(member) else "nothing", CUT_SECONDS)
        scene.say(f"the host says: {_disk_trouble(member)}")
        of_app = [job for job in scene.cluster.jobs(member) if job.app == APP]
        if of_app:
            scene.signal(of_app[0], "KILL")  # one has to be started anew, wherever there is room
        until("six jobs run", scene.carried_by_the_others, CARRIED_SECONDS)
        scene.say(f"app and database work after {time.monotonic() - scene.struck_at:.1f} s")
        time.sleep(max(0.0, scene.struck_at + CUT_SECONDS - time.monotonic()))
    finally:
        filler.unlink(missing_ok=True)
    until("the host has room again", lambda: _disk_trouble(member), CUT_SECONDS)


def _disk_trouble(member: Node) -> str:
    said = ask(member, HOST_API, "/host/status").json()
    assert isinstance(said, dict)
    return str((said.get("disk") or {}).get("trouble", ""))


def _fill(filler: Path) -> None:
    """Take all that is free, without writing it."""
    with filler.open("wb") as file:
        for size in (1 << 30, 1 << 25, 1 << 20, 1 << 15, 1 << 12):
            while True:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError:
                    break


# Nodes lose their power.


def _power(name: str, what: str, choose: Callable[[Scene], Node]) -> None:
    def procedure(scene: Scene) -> None:
        member = choose(scene)
        scene.say(f"{member.id}, {OFF_SECONDS} s")
        with scene.dark(member):
            scene.strike(member)
            node.power_cut(member)
            scene.wait_carried(scene.struck_at, OFF_SECONDS)
            scene.power_on(member)

    fault(name, what)(procedure)


def _gather_leaders(scene: Scene) -> Node:
    """Make one node lead everything: the one with PostgreSQL's primary."""
    cluster = scene.cluster
    target = cluster.database_role("primary").member
    for _ in range(12):
        leading = cluster.directory_leader()
        if leading == target:
            break
        scene.signal(cluster.job("discoverd", "app", leading), "KILL")
        until("the directory is whole", lambda: next(cluster._members_out_of_place(), ""), 40)
    for _ in range(3):
        scheduler = cluster.leading_job("controller-scheduler")
        if scheduler.member == target:
            break
        scene.signal(scheduler, "KILL")
        until(
            "another scheduler leads",
            lambda id=scheduler.id: "" if cluster.leading_job("controller-scheduler").id != id else "the same",  # type: ignore[misc]
            30,
        )
    until("all is whole", cluster.missing, 120)
    found = (
        cluster.directory_leader(),
        cluster.leading_job("controller-scheduler").member,
        cluster.database_role("primary").member,
    )
    if set(found) != {target}:
        raise NotMet(f"the leaders could not be gathered: {', '.join(member.id for member in found)}")
    return target


for number in range(3):
    _power(
        f"power-node{number + 1}",
        f"node {number + 1} loses its power for 20 s",
        lambda s, n=number: s.cluster.members[n],
    )  # type: ignore[misc]
_power(
    "power-leaders", "the node that leads directory, scheduler and PostgreSQL loses its power for 20 s", _gather_leaders
)


def _all_without_power(scene: Scene, back: list[Node], apart: float) -> None:
    members = scene.cluster.members
    scene.cluster.requests.dark = scene.cluster.writes.dark = frozenset(members)
    try:
        scene.strike(*members)
        for member in members:
            node.power_cut(member)
        time.sleep(5)
        for number, member in enumerate(back):
            time.sleep(apart if number else 0)
            scene.power_on(member)
    finally:
        scene.cluster.requests.dark = scene.cluster.writes.dark = frozenset()
    scene.strike()  # what the app does with the power back is what counts


@fault("power-all", "all nodes lose their power at once and get it back at once")
def _(scene: Scene) -> None:
    _all_without_power(scene, list(scene.cluster.members), 0)


@fault("power-all-staggered", "all nodes lose their power at once and get it back one by one, 8 s apart")
def _(scene: Scene) -> None:
    _all_without_power(scene, list(reversed(scene.cluster.members)), 8)


@fault("replace-node", "a node is lost for good: removed by force, and a new one joins in its place")
def _(scene: Scene) -> None:
    cluster = scene.cluster
    leader = cluster.directory_leader()
    member = next(m for m in reversed(cluster.members) if m != leader)
    scene.say(member.id)
    with scene.dark(member):
        scene.strike(member)
        node.remove(member)
        scene.wait_carried(scene.struck_at, OFF_SECONDS)
        scene.cluster.inside(leader, f"flynn-host demote --force {member.ip}")
        scene.booting.add(member)
        lab.add(member.number)
        scene.say(f"a new {member.id} has joined after {time.monotonic() - scene.struck_at:.1f} s")
        until("its discoverd observes", lambda: _not_observing(cluster, member), 60)
        until(
            "it is promoted",
            lambda: "" if scene.cluster.inside(leader, f"flynn-host promote {member.ip}") else "no word",
            60,
        )


def _not_observing(cluster: Cluster, member: Node) -> str:
    standing = cluster.standing(member)
    return "" if standing["role"] == "observer" and standing["leader"] else f"{standing['role']}"


def heal(cluster: Cluster) -> None:
    """Undo whatever a procedure that broke off may have left: power, links, stopped processes, full disks."""
    for member in cluster.members:
        (member.root / FILLER).unlink(missing_ok=True)
        if node.init_pid(member) is None:
            network.plug_in(member)
            node.switch_on(member)
            continue
        network.mend(member)
        subprocess.run(node.inside(member, ["sh", "-c", "kill -CONT -1"]), capture_output=True, timeout=30, check=False)
    cluster.requests.dark = cluster.writes.dark = frozenset()
    cluster.user.enter_through(cluster.members[0])
