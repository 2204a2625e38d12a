"""Three nodes with an app on all of them: what they say, and what can be done to their jobs."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.cluster.lab import hosts_file, node
from tests.cluster.lab.layout import Node, names, nodes
from tests.cluster.lab.user import User

APP = "trio"


class Lab:
    """The three nodes; commands on them, and the app as each node's router serves it."""

    def __init__(self, domain: str) -> None:
        self.nodes = nodes(3)
        self.domain = domain

    def on(self, member: Node, *command: str, timeout: float = 60) -> str:
        """What a command that must succeed prints on a node."""
        env = node.command_environment(member)
        done = subprocess.run(
            node.inside(member, command), env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{member.id}: {' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def roles(self, seen_from: Node | None = None) -> dict[str, str]:
        """What the discoverd of each host is: `peer`, `peer (leader)` or `proxy`."""
        listed = json.loads(self.on(seen_from or self.nodes[0], "flynn-host", "list", "--json"))
        return {host["id"]: host["raft_status"] for host in listed}

    def discoverd(self, member: Node, path: str, *options: str) -> str:
        """What the discoverd of a node says to its operator, headers included."""
        ask = f'curl -sS -i -m 5 {" ".join(options)} -u ":$(cat {member.config}/host.key)" http://127.0.0.1:1111{path}'
        return self.on(member, "sh", "-c", ask)

    def jobs(self, member: Node) -> list[dict[str, object]]:
        """The running jobs of one node, asked there."""
        return [
            job
            for job in json.loads(self.on(member, "flynn-host", "ps", "--json"))
            if str(job["job"]["id"]).startswith(f"{member.id}-") and job.get("status") == 1
        ]

    def job(self, member: Node, app: str) -> dict[str, object]:
        for job in self.jobs(member):
            if job["job"]["metadata"].get("flynn-controller.app_name") == app:  # type: ignore[index]
                return job
        raise AssertionError(f"no running job of {app} on {member.id}")

    def in_container(self, member: Node, app: str, *command: str) -> tuple[list[str], str]:
        """A command line that runs in the network of an app's container, and the container's address."""
        job = self.job(member, app)
        address = str(job["internal_ip"])
        return node.inside(member, ["nsenter", "-t", str(job["pid"]), "-n", *command]), address

    def kill(self, member: Node, app: str) -> None:
        """kill -9 of an app's job on a node, container and all."""
        self.on(member, "kill", "-KILL", str(self.job(member, app)["pid"]))

    def signal(self, member: Node, app: str, name: str) -> None:
        """Send a signal to the app itself, below the first process of its container."""
        pid = self.job(member, app)["pid"]
        self.on(member, "sh", "-c", f"kill -{name} $(cat /proc/{pid}/task/{pid}/children)")

    def get(self, router: Node, app: str = APP, path: str = "/") -> str | None:
        """The body of a 200 through one node's router; None for anything else."""
        done = subprocess.run(
            ["curl", "-sS", "-f", "-m", "3", "-H", f"Host: {app}.{self.domain}", f"http://{router.ip}{path}"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        return done.stdout if done.returncode == 0 else None

    @contextmanager
    def asking(self) -> Iterator[Counter[str]]:
        """Ask for the app through every router while the block runs: how often it was answered, and how often not."""
        counted: Counter[str] = Counter()
        counting, done = threading.Lock(), threading.Event()

        def ask(router: Node) -> None:
            while not done.is_set():
                answer = "answered" if self.get(router) is not None else "failed"
                with counting:
                    counted[answer] += 1

        with ThreadPoolExecutor(len(self.nodes)) as threads:
            asked = [threads.submit(ask, router) for router in self.nodes]
            try:
                yield counted
            finally:
                done.set()
                for one in asked:
                    one.result(timeout=30)

    def answering(self, router: Node, requests: int = 40) -> Counter[str]:
        """Which jobs of the app answer through a router; every request must be answered."""
        found: Counter[str] = Counter()
        for _ in range(requests):
            body = self.get(router)
            assert body is not None, f"no answer through {router.id}"
            found[body.split()[-1]] += 1
        return found


class TrioUser(User):
    """A user whose names lead to the node that they choose."""

    def enter_through(self, member: Node) -> None:
        hosts_file.publish(member.ip, names(self.domain, (APP,)))

    def up(self, app: str = APP) -> Counter[str]:
        """How many jobs of the app are up on each host, by `flynn ps`."""
        rows = self.flynn("-a", app, "ps", timeout=20).splitlines()[1:]
        return Counter(row.partition("-")[0] for row in rows if re.search(r"\sup\s", row))
