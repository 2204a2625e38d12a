"""The whole development cluster: up, down, and what its users need to know."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.cluster.lab import hosts_file, network, node
from tests.cluster.lab.layout import DOMAIN, IMAGES, PUBLISHED, Node, names, nodes

MAX_NODES = 5
ON_SECONDS = 30


@dataclass(slots=True)
class Phases:
    """The time that each part of a long command takes, said as it goes."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"=====> {name}", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        print(f"-----> {name}: {self.seconds[name]:.1f} s", flush=True)

    def table(self) -> str:
        width = max(map(len, self.seconds), default=0)
        rows = [f"  {name:<{width}}  {seconds:7.1f} s" for name, seconds in self.seconds.items()]
        return "\n".join([*rows, f"  {'in all':<{width}}  {sum(self.seconds.values()):7.1f} s"])


def up(count: int, phases: Phases) -> None:
    """Take down what runs, boot `count` nodes, bootstrap, and publish how to use the cluster."""
    if count not in range(1, MAX_NODES + 1) or count == 2:
        raise SystemExit(f"make cluster: NODES must be 1, or from 3 to {MAX_NODES}: two cannot outvote a lost one")
    if os.geteuid() != 0:
        raise SystemExit("make cluster: must be run as root: it makes namespaces, mounts and cgroups")
    with phases.phase("take down the previous cluster"):
        down()
    members = nodes(count)
    with phases.phase("boot"):
        network.raise_bridge()
        node.share_base()
        node.start_zfs()
        first, *others = members
        for member in members:
            network.plug_in(member)
            node.lay_out(member)
        node.found(first)
        node.switch_on(first)
        wait_until_on(first)
        if others:
            token = node.invite(first, uses=len(others))
            for member in others:
                node.join(member, token)
                node.switch_on(member)
            for member in others:
                wait_until_on(member)
    with phases.phase("bootstrap"):
        add_command = bootstrap(members)
    publish(members, add_command)


def add(number: int) -> None:
    """Join one more node to the running cluster."""
    member = Node(number)
    running = next(other for other in nodes(MAX_NODES) if node.init_pid(other) is not None)
    network.plug_in(member)
    node.lay_out(member)
    node.join(member, node.invite(running, uses=1))
    node.switch_on(member)
    wait_until_on(member)


def wait_until_on(member: Node) -> None:
    """Until flynn-host answers on the node."""

    def answers() -> bool:
        command = node.inside(member, ["flynn-host", "status", "--json"])
        env = node.command_environment(member)
        return subprocess.run(command, env=env, capture_output=True, timeout=30).returncode == 0

    wait_for(f"flynn-host on {member.id}", answers, ON_SECONDS, hint=f"see {member.console}")


def wait_for(what: str, holds: Callable[[], bool], seconds: float, hint: str = "") -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except (OSError, RuntimeError, subprocess.SubprocessError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:.0f} s. {hint}".rstrip())
        time.sleep(0.2)


def bootstrap(members: list[Node]) -> str:
    """Run `flynn-host bootstrap` on the first node; returns the `flynn cluster add` command it ends with."""
    first = members[0]
    command = ["flynn-host", "bootstrap", "--images", str(IMAGES), "--min-hosts", str(len(members))]
    if len(members) > 1:
        command += ["--peer-ips", ",".join(member.ip for member in members)]
    env = node.command_environment(first, {"CLUSTER_DOMAIN": DOMAIN})
    done = subprocess.run(node.inside(first, command), env=env, stdout=subprocess.PIPE, text=True, timeout=900)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise SystemExit(
            f"the bootstrap failed. Look with `make cluster-shell`, then: flynn-host ps -a; the daemon's output is in "
            f"{first.console}"
        )
    return lines[-1]


def publish(members: list[Node], add_command: str) -> None:
    """Write .cluster/ and the names in /etc/hosts, and add the cluster to a client configuration of its own."""
    _, _, _, _, pin, _, domain, key = shlex.split(add_command)
    PUBLISHED.mkdir(exist_ok=True)
    settings = {
        "CLUSTER_DOMAIN": domain,
        "CONTROLLER_KEY": key,
        "TLS_PIN": pin,
        "NODE_IPS": ",".join(member.ip for member in members),
        "CLUSTER_ADD_COMMAND": add_command,
        "FLYNNRC": str(PUBLISHED / "flynnrc"),
        "GIT_CONFIG_GLOBAL": str(PUBLISHED / "gitconfig"),
    }
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    lines.append(f'export PATH={shlex.quote(str(node.BIN))}:"$PATH"\n')
    (PUBLISHED / "env").write_text("".join(lines))
    (PUBLISHED / "env").chmod(0o600)
    (PUBLISHED / "gitconfig").write_text("[include]\n\tpath = ~/.gitconfig\n[safe]\n\tdirectory = *\n")
    (PUBLISHED / "flynnrc").unlink(missing_ok=True)
    hosts_file.publish(members[0].ip, names(domain))
    flynn(*shlex.split(add_command)[1:])


def environment() -> dict[str, str]:
    """The environment of a user of the running cluster, as `.cluster/env` sets it."""
    env = {**os.environ, "PATH": f"{node.BIN}:{os.environ.get('PATH', '')}"}
    for line in (PUBLISHED / "env").read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name == "PATH":
            continue  # done above: only a shell can extend its own
        env[name] = shlex.split(value)[0] if value else ""
    return env


def flynn(*arguments: str, check: bool = True, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the `flynn` client as a user would; its output goes to the terminal."""
    done = subprocess.run(["flynn", *arguments], env=environment(), text=True, cwd=cwd, timeout=600)
    if check and done.returncode != 0:
        raise SystemExit(f"flynn {' '.join(arguments)}: exit status {done.returncode}")
    return done


def down() -> None:
    """Remove everything that `up` made, also after it was interrupted."""
    hosts_file.withdraw()
    for member in nodes(MAX_NODES):
        if member.root.exists() or network.exists(member.link):
            node.remove(member)
    network.remove_bridge()
    node.unshare_base()
    shutil.rmtree(PUBLISHED, ignore_errors=True)


def describe() -> str:
    env = environment()
    return (
        f"The cluster is up at https://controller.{env['CLUSTER_DOMAIN']}\n"
        f"  use it here:   source {PUBLISHED / 'env'}; flynn apps\n"
        f"  or elsewhere:  {env['CLUSTER_ADD_COMMAND']}\n"
        f"  on the node:   make cluster-shell, then flynn-host ps\n"
        f"  remove it:     make cluster-down"
    )


def main(arguments: list[str]) -> None:
    match arguments:
        case ["up", count]:
            phases = Phases()
            up(int(count), phases)
            print(phases.table())
            print(describe())
        case ["down"]:
            down()
        case ["demo"]:
            from tests.cluster.lab.demo import demo

            demo()
        case ["exec", number, *command]:
            member = Node(int(number))
            env = node.command_environment(member)
            line = node.inside(member, command or ["bash"])
            os.execvpe(line[0], line, env)
        case ["power-cut", number]:
            node.power_cut(Node(int(number)))
        case ["power-on", number]:
            member = Node(int(number))
            network.plug_in(member)
            node.switch_on(member)
            wait_until_on(member)
        case ["add", number]:
            add(int(number))
        case ["cut", number]:
            network.cut(Node(int(number)))
        case ["mend", number]:
            network.mend(Node(int(number)))
        case ["nodes"]:
            print(json.dumps([{"id": m.id, "ip": m.ip, "on": node.init_pid(m) is not None} for m in nodes(MAX_NODES)]))
        case _:
            numbered = "power-cut N | power-on N | add N | cut N | mend N"
            sys.exit(f"usage: python -m tests.cluster up N | down | demo | exec N [COMMAND] | nodes | {numbered}")
