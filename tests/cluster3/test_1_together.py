"""Three nodes that are whole: who keeps the directory, where jobs are, how containers reach each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.lab.trio import Lab, TrioUser

pytestmark = pytest.mark.cluster3

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7777))
server.settimeout(20)
print("listening", flush=True)
connection, address = server.accept()
print(address[0], len(connection.makefile("rb").read()), flush=True)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7777), timeout=10)
print(connection.getsockname()[0])
connection.sendall(b"x" * 3_000_000)
"""


def test_every_host_keeps_the_directory_and_one_leads(three: Lab) -> None:
    roles = three.roles()
    assert sorted(roles.values()) == ["peer", "peer", "peer (leader)"]
    assert all(three.roles(member) == roles for member in three.nodes)


def test_six_jobs_are_two_per_node_and_every_router_has_all(three: Lab, user: TrioUser, app: str) -> None:
    assert user.up() == {"node1": 2, "node2": 2, "node3": 2}
    for member in three.nodes:
        assert {job.partition("-")[0] for job in three.answering(member)} == {"node1", "node2", "node3"}


def test_containers_on_different_nodes_reach_each_other_unmasked(three: Lab, app: str) -> None:
    first, _, third = three.nodes
    serve, there = three.in_container(third, app, "python3", "-c", SERVER)
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
        connect, here = three.in_container(first, app, "python3", "-c", CLIENT, there)
        said = subprocess.run(connect, capture_output=True, text=True, timeout=30, check=False)
        assert said.returncode == 0, said.stderr
        assert said.stdout.strip() == here
        assert server.stdout.readline().split() == [here, "3000000"]  # who it was, and that large packets get through


def test_the_mtu_of_a_container_is_what_the_overlay_carries(three: Lab, app: str) -> None:
    first = three.nodes[0]
    show, _ = three.in_container(first, app, "ip", "-j", "link", "show", "dev", "eth0")
    mtu = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)[0]["mtu"]
    assert mtu == 1450


def test_names_resolve_on_every_node(three: Lab, app: str) -> None:
    for member in three.nodes:
        bridge = json.loads(three.on(member, "flynn-host", "status", "--json"))["discoverd"]["dns"].partition(":")[0]
        ask = (
            "import dnslib, sys; ask = dnslib.DNSRecord.question(sys.argv[2]);"
            "reply = ask.send(sys.argv[1], 53, tcp=True, timeout=5);"
            "print(*(record.rdata for record in dnslib.DNSRecord.parse(reply).rr))"
        )
        answer = three.on(member, sys.executable, "-c", ask, bridge, f"{app}-web.discoverd")
        assert len(answer.split()) == 6


def test_state_is_where_it_was_written(three: Lab) -> None:
    for member in three.nodes:
        data = three.on(member, "sh", "-c", f"find {member.volumes} -name members.json")
        assert len(data.split()) == 1
        assert len(json.loads(Path(data.strip()).read_text())) == 3
