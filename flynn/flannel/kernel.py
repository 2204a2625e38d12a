"""Reading and changing the kernel's side by netlink. Every call opens its own socket and blocks: run it in a thread.

Routes carry our protocol number, so that on a shared device (host-gw) nobody else's are touched. On the VXLAN device
everything is ours.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from typing import Any

from pyroute2 import IPRoute
from pyroute2 import NetlinkError as NetlinkError  # what every function here may raise

from flynn.flannel.datapath import Datapath, Forwarding, Neighbour, Route

ROUTE_PROTOCOL = 66  # shows as "proto 66" in `ip route`; below 17 belongs to the kernel and its friends
_IPV4 = 2
_MAIN_TABLE = 254
_PERMANENT = 0x80
_NOARP = 0x40
_SELF = 0x02


class NoInterface(Exception):
    """There is no interface with that address or name, or it cannot be used."""


@dataclass(frozen=True, slots=True)
class Interface:
    index: int
    name: str
    address: str
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VxlanDevice:
    name: str
    vni: int
    port: int
    underlay: Interface


@dataclass(frozen=True, slots=True)
class Device:
    index: int
    mac: str
    mtu: int


def find_interface(address_or_name: str) -> Interface:
    """The interface that carries this address, or has this name (then with its first global address).

    Raises NoInterface.
    """
    with IPRoute() as ip:
        for address in ip.get_addr(family=_IPV4):
            local = address.get_attr("IFA_LOCAL")
            link = ip.get_links(address["index"])[0]
            name, mtu = str(link.get_attr("IFLA_IFNAME")), int(link.get_attr("IFLA_MTU") or 0)
            if address_or_name in (local, name):
                if mtu == 0:
                    raise NoInterface(f"{name} has no MTU")
                return Interface(int(address["index"]), name, str(local), mtu)
    raise NoInterface(f"no interface has the address or name {address_or_name!r}")


def ensure_vxlan(wanted: VxlanDevice) -> Device:
    """The device, made anew only if the one of that name is another kind: keeping it keeps its MAC and its traffic."""
    with IPRoute() as ip:
        existing = ip.link_lookup(ifname=wanted.name)
        if existing and not _is_like(ip.get_links(existing[0])[0], wanted):
            ip.link("del", index=existing[0])
            existing = []
        if not existing:
            ip.link(
                "add",
                ifname=wanted.name,
                kind="vxlan",
                vxlan_id=wanted.vni,
                vxlan_link=wanted.underlay.index,
                vxlan_local=wanted.underlay.address,
                vxlan_port=wanted.port,
                vxlan_learning=False,
                txqlen=0,
            )
            existing = ip.link_lookup(ifname=wanted.name)
        ip.link("set", index=existing[0], state="up")
        link = ip.get_links(existing[0])[0]
        return Device(existing[0], str(link.get_attr("IFLA_ADDRESS")).lower(), int(link.get_attr("IFLA_MTU")))


def ensure_only_address(index: int, address: IPv4Interface) -> None:
    with IPRoute() as ip:
        ip.addr("replace", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        for other in ip.get_addr(family=_IPV4, index=index):
            found = (other.get_attr("IFA_ADDRESS"), other["prefixlen"])
            if found != (str(address.ip), address.network.prefixlen):
                ip.addr("del", index=index, address=found[0], prefixlen=found[1])
        # Usually the kernel has added this route with the address; not if the address was there before the link.
        ip.route("replace", dst=str(address.network), oif=index, prefsrc=str(address.ip), scope=253, proto=2)


def read_datapath(index: int, *, layer2: bool) -> Datapath:
    """What there is on a device; `layer2` when it is a VXLAN device of ours."""
    with IPRoute() as ip:
        forwarding, neighbours = frozenset[Forwarding](), frozenset[Neighbour]()
        if layer2:
            forwarding = frozenset(
                Forwarding(str(entry.get_attr("NDA_LLADDR")).lower(), str(entry.get_attr("NDA_DST")))
                for entry in ip.fdb("dump", ifindex=index)
                if entry.get_attr("NDA_DST")
            )
            neighbours = frozenset(
                Neighbour(str(entry.get_attr("NDA_DST")), str(entry.get_attr("NDA_LLADDR")).lower())
                for entry in ip.get_neighbours(ifindex=index, family=_IPV4)
                if entry["state"] & _PERMANENT
            )
        routes = frozenset(
            Route(IPv4Network((route.get_attr("RTA_DST"), route["dst_len"])), str(route.get_attr("RTA_GATEWAY")))
            for route in ip.get_routes(family=_IPV4, table=_MAIN_TABLE, oif=index)
            if route.get_attr("RTA_GATEWAY") and _is_ours(route, on_own_device=layer2)
        )
        return Datapath(forwarding, neighbours, routes)


def change_datapath(index: int, *, add: Datapath, remove: Datapath, layer2: bool) -> list[str]:
    """Remove, then add; an entry the kernel refuses is reported and the rest still done."""
    refused: list[str] = []
    flags = ["onlink"] if layer2 else []
    with IPRoute() as ip:

        def attempt(what: object, call: Any, command: str, **arguments: Any) -> None:
            try:
                call(command, **arguments)
            except NetlinkError as error:
                if not (command == "del" and error.code in (errno.ESRCH, errno.ENOENT)):
                    refused.append(f"{command} {what}: {error}")

        kept = {route.subnet for route in add.routes}
        for route in remove.routes:
            if route.subnet not in kept:  # else it is replaced below, without a gap
                attempt(route, ip.route, "del", dst=str(route.subnet), gateway=route.gateway, oif=index)
        moved = {neighbour.address for neighbour in add.neighbours}
        for neighbour in remove.neighbours:
            if neighbour.address not in moved:
                attempt(neighbour, ip.neigh, "del", ifindex=index, dst=neighbour.address, lladdr=neighbour.mac)
        for entry in add.forwarding:
            # Replacing, as the kernel silently ignores a second destination for a MAC it knows.
            attempt(
                entry,
                ip.fdb,
                "replace",
                ifindex=index,
                lladdr=entry.mac,
                dst=entry.public_ip,
                state=_PERMANENT | _NOARP,
                flags=_SELF,
            )
        for neighbour in add.neighbours:
            attempt(
                neighbour,
                ip.neigh,
                "replace",
                ifindex=index,
                dst=neighbour.address,
                lladdr=neighbour.mac,
                state=_PERMANENT,
            )
        for route in add.routes:
            attempt(
                route,
                ip.route,
                "replace",
                dst=str(route.subnet),
                gateway=route.gateway,
                oif=index,
                proto=ROUTE_PROTOCOL,
                flags=flags,
            )
        redirected = {entry.mac for entry in add.forwarding}
        for entry in remove.forwarding:
            if entry.mac not in redirected:
                attempt(entry, ip.fdb, "del", ifindex=index, lladdr=entry.mac, dst=entry.public_ip)
    return refused


def _is_ours(route: Any, *, on_own_device: bool) -> bool:
    return on_own_device or route["proto"] == ROUTE_PROTOCOL


def _is_like(link: Any, wanted: VxlanDevice) -> bool:
    if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "vxlan":
        return False
    data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    found = {name: data.get_attr(f"IFLA_VXLAN_{name}") for name in ("ID", "LINK", "LOCAL", "PORT", "LEARNING")}
    return found == {
        "ID": wanted.vni,
        "LINK": wanted.underlay.index,
        "LOCAL": wanted.underlay.address,
        "PORT": wanted.port,
        "LEARNING": 0,
    }
