"""The packet filter, seen by containers of a user and of a system app, between two namespaces that play two hosts."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from flynn.host.network import firewall
from flynn.host.network.bridge import ensure_bridge, remove_bridge
from flynn.host.network.firewall import Policy
from flynn.host.network.ports import mac_address, port_name
from flynn.host.runtime import kernel

pytestmark = pytest.mark.root

POLICY = Policy(
    bridge="fwbr0",
    address=IPv4Interface("100.101.7.1/24"),
    overlay=IPv4Network("100.101.0.0/16"),
    hosts=[IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")],
    trusted=[IPv4Address("100.101.7.3")],
)
USER, SYSTEM = "100.101.7.2", "100.101.7.3"
BRIDGE, HERE, THERE, OTHER_BRIDGE = "100.101.7.1", "192.0.2.1", "192.0.2.2", "100.101.8.1"
LISTENING = (53, 80, 1111, 1113, 3333, 5000, 22)


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, executable="/bin/sh")  # noqa: S602


class World:
    """This namespace is a host with bridge and two jobs; a second one is another host (and the internet)."""

    def __init__(self) -> None:
        self.namespaces: dict[str, int] = {}
        self.before = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.sockets: list[socket.socket] = []
        for name in ("user", "system", "other", "host"):
            kernel.unshare(kernel.CLONE_NEWNET)
            sh("ip link set lo up")
            self.namespaces[name] = os.open("/proc/self/ns/net", os.O_RDONLY)
        ensure_bridge("fwbr0", POLICY.address, 1500)
        for name, ip in (("user", USER), ("system", SYSTEM)):
            self._veth(name, f"{ip}/24", "master fwbr0", BRIDGE)
        self._veth("other", f"{THERE}/24", "", None)
        sh(f"ip addr add {HERE}/24 dev vother; ip route add default via {THERE}")
        with self.inside("other"):
            sh(f"ip addr add {OTHER_BRIDGE}/24 dev lo; ip addr add 198.51.100.1/32 dev lo")
            sh(f"ip route add 100.101.7.0/24 via {HERE}")
            self._listen()
        self._listen()
        with self.inside("system"):
            self._listen()

    def _veth(self, name: str, address: str, extra: str, gateway: str | None) -> None:
        peer = f"/proc/self/fd/{self.namespaces[name]}"
        outside = port_name(address.partition("/")[0]) if gateway else f"v{name}"
        mac = f"address {mac_address(address.partition('/')[0]).hex(':')}" if gateway else ""
        sh(f"ip link add {outside} type veth peer name eth0 {mac}")
        inside = self.namespaces[name]
        subprocess.run(["ip", "link", "set", "eth0", "netns", peer], check=True, pass_fds=[inside])
        sh(f"ip link set {outside} {extra} up")
        with self.inside(name):
            sh(f"ip addr add {address} dev eth0; ip link set eth0 up")
            if gateway:
                sh(f"ip route add default via {gateway}")

    class _Inside:
        def __init__(self, fd: int, back: int) -> None:
            self.fd, self.back = fd, back

        def __enter__(self) -> None:
            kernel.setns(self.fd, kernel.CLONE_NEWNET)

        def __exit__(self, *_: object) -> None:
            kernel.setns(self.back, kernel.CLONE_NEWNET)

    def inside(self, name: str) -> World._Inside:
        return World._Inside(self.namespaces[name], self.namespaces["host"])

    def _listen(self) -> None:
        for port in LISTENING:
            listener = socket.socket(socket.AF_INET6)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("::", port))
            listener.listen()
            self.sockets.append(listener)

    def reaches(self, who: str, address: str, port: int) -> bool:
        with self.inside(who), socket.socket() as client:
            client.settimeout(4)  # what is forbidden is refused at once
            try:
                client.connect((address, port))
            except OSError:
                return False
            return True

    def close(self) -> None:
        for listener in self.sockets:
            listener.close()
        remove_bridge("fwbr0")
        kernel.setns(self.before, kernel.CLONE_NEWNET)
        for fd in (*self.namespaces.values(), self.before):
            os.close(fd)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    try:
        asyncio.run(firewall.apply(POLICY))
        yield world
    finally:
        world.close()


@pytest.mark.parametrize(
    ("who", "address", "port", "allowed"),
    [
        pytest.param("user", BRIDGE, 53, True, id="user asks DNS"),
        pytest.param("user", BRIDGE, 80, True, id="user uses the router on the bridge"),
        pytest.param("user", HERE, 3333, True, id="user uses a TCP route"),
        pytest.param("user", BRIDGE, 1111, False, id="user, discoverd on the bridge"),
        pytest.param("user", HERE, 1113, False, id="user, own host's API"),
        pytest.param("user", HERE, 22, False, id="user, anything else of its host"),
        pytest.param("user", HERE, 53, False, id="user, DNS only on the bridge"),
        pytest.param("user", THERE, 1113, False, id="user, other host's API"),
        pytest.param("user", THERE, 5000, False, id="user, other host's router API"),
        pytest.param("user", THERE, 80, True, id="user, other host's router"),
        pytest.param("user", OTHER_BRIDGE, 1111, False, id="user, discoverd on another bridge"),
        pytest.param("user", OTHER_BRIDGE, 80, True, id="user, router on another bridge"),
        pytest.param("user", SYSTEM, 5000, True, id="user, port of another job"),
        pytest.param("user", "198.51.100.1", 1113, True, id="user, the same ports elsewhere in the world"),
        pytest.param("system", BRIDGE, 1111, True, id="system, discoverd on the bridge"),
        pytest.param("system", HERE, 1113, True, id="system, own host's API"),
        pytest.param("system", THERE, 1113, True, id="system, other host's API"),
        pytest.param("system", OTHER_BRIDGE, 1111, True, id="system, other bridge"),
        pytest.param("other", SYSTEM, 5000, True, id="another host reaches a job"),
    ],
)
def test_who_reaches_what(world: World, who: str, address: str, port: int, allowed: bool) -> None:
    assert world.reaches(who, address, port) is allowed


def test_a_job_cannot_speak_as_another(world: World) -> None:
    """Not even while the other one is silent and nobody remembers where it was."""
    with world.inside("system"):
        sh("ip link set eth0 down")
    with world.inside("user"):
        sh(f"ip addr add {SYSTEM}/32 dev eth0; ip neigh flush dev eth0")
    sh("ip neigh flush dev fwbr0")
    try:
        with world.inside("user"), socket.socket() as client:
            client.bind((SYSTEM, 0))
            client.settimeout(0.5)
            with pytest.raises(OSError):
                client.connect((BRIDGE, 1111))
    finally:
        with world.inside("user"):
            sh(f"ip addr del {SYSTEM}/32 dev eth0")
        with world.inside("system"):
            sh(f"ip link set eth0 up; ip route add default via {BRIDGE}")
    sh("ip neigh flush dev fwbr0")
    assert world.reaches("user", BRIDGE, 80)
    assert world.reaches("system", BRIDGE, 1111)


def test_large_subnets_are_not_bound_port_by_port() -> None:
    wide = replace(POLICY, address=IPv4Interface("100.101.0.1/16"))
    assert len(firewall.render(wide)) < 4000
    assert port_name("100.101.7.2") in firewall.render(POLICY)


def test_masquerade_only_outside_the_overlay(world: World) -> None:
    with world.inside("other"):
        listener = socket.create_server(("0.0.0.0", 4444))
    try:
        for target, seen in (("198.51.100.1", HERE), (OTHER_BRIDGE, SYSTEM)):
            with world.inside("system"):
                client = socket.create_connection((target, 4444), timeout=1)
            connection, peer = listener.accept()
            assert peer[0] == seen
            client.close()
            connection.close()
    finally:
        listener.close()


def test_trust_comes_and_goes(world: World) -> None:
    asyncio.run(firewall.trust(POLICY, IPv4Address(USER)))
    assert world.reaches("user", HERE, 1113)
    for _ in range(2):
        asyncio.run(firewall.distrust(POLICY, IPv4Address(USER)))
    assert not world.reaches("user", HERE, 1113)


def test_applying_again_changes_nothing(world: World) -> None:
    def rules() -> str:
        return subprocess.check_output(["nft", "list", "table", "inet", "flynn"], text=True)

    before = rules()
    asyncio.run(firewall.apply(POLICY))
    assert rules() == before


def test_another_table_lives_beside_and_goes_alone(world: World) -> None:
    asyncio.run(firewall.apply(replace(POLICY, table="flynn2")))
    for _ in range(2):
        asyncio.run(firewall.remove("flynn2"))
    assert "flynn2" not in subprocess.check_output(["nft", "list", "tables"], text=True)


def test_refusals_say_why(world: World) -> None:
    with pytest.raises(firewall.FirewallError, match="No such file or directory"):
        asyncio.run(firewall.trust(replace(POLICY, table="none"), IPv4Address(USER)))


def test_bridge_is_brought_to_the_wanted_state(world: World) -> None:
    ensure_bridge("fwbr0", IPv4Interface("100.101.7.9/25"), 1400)
    shown = subprocess.check_output(["ip", "-o", "addr", "show", "fwbr0"], text=True)
    assert "100.101.7.9/25" in shown
    assert "100.101.7.1/" not in shown
    ensure_bridge("fwbr0", POLICY.address, 1450)
    link = subprocess.check_output(["ip", "link", "show", "fwbr0"], text=True)
    assert "mtu 1450" in link
    assert "link/ether fe:" in link
