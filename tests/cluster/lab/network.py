"""The cluster's wires: one bridge on the machine, a network namespace and a cable for each node."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.lab.layout import BRIDGE, GATEWAY, NETWORK, PREFIX, TABLE, Node

RULES = f"""
table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
  chain outbound {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {NETWORK} ip daddr != {NETWORK} oifname != "{BRIDGE}" masquerade
  }}
  chain through {{
    type filter hook forward priority filter; policy accept;
    iifname "{BRIDGE}" accept
    oifname "{BRIDGE}" ct state established,related accept
  }}
}}
"""


def run(*command: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a command to its end; its output. Raises RuntimeError with what it said on failure."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def exists(link: str) -> bool:
    return Path(f"/sys/class/net/{link}").exists()


def raise_bridge() -> None:
    if not exists(BRIDGE):
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "replace", f"{GATEWAY}/{PREFIX}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    run("nft", "-f", "-", stdin=RULES)


def remove_bridge() -> None:
    if exists(BRIDGE):
        run("ip", "link", "del", BRIDGE)
    run("nft", "delete", "table", "ip", TABLE, check=False)


def plug_in(node: Node) -> None:
    """Give a node an empty network namespace with one interface, `eth0`, on the bridge."""
    unplug(node)
    run("ip", "netns", "add", node.namespace)
    run("ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
    run("ip", "link", "set", node.link, "master", BRIDGE, "up")
    inside = ("ip", "-n", node.namespace)
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "addr", "add", f"{node.ip}/{PREFIX}", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "route", "add", "default", "via", GATEWAY)


def unplug(node: Node) -> None:
    run("ip", "netns", "del", node.namespace, check=False)
    if exists(node.link):
        run("ip", "link", "del", node.link, check=False)  # It goes with the namespace, a moment later.


def cut(node: Node) -> None:
    run("ip", "link", "set", node.link, "down")


def mend(node: Node) -> None:
    run("ip", "link", "set", node.link, "up")
