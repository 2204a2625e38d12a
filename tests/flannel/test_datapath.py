"""What the kernel should know, from the leases."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from flynn.flannel.datapath import Datapath, Forwarding, Neighbour, Route, wanted
from flynn.flannel.document import Lease, overlay_of


def lease(n: int, backend: str = "vxlan", mac: str | None = None) -> Lease:
    subnet = IPv4Network(f"10.0.{n}.0/24")
    return Lease(
        subnet=subnet, public_ip=f"10.9.0.{n}", backend=backend, vtep_mac=f"02:00:00:00:00:0{n}" if mac is None else mac
    )


def routes(kind: str, *leases: Lease) -> Datapath:
    overlay = overlay_of({"config": {"Network": "10.0.0.0/16", "Backend": {"Type": kind}}})
    return wanted(overlay, leases, leases[0])


def test_vxlan_knows_every_other_machine() -> None:
    assert routes("vxlan", lease(1), lease(2), lease(3)) == Datapath(
        frozenset({Forwarding("02:00:00:00:00:02", "10.9.0.2"), Forwarding("02:00:00:00:00:03", "10.9.0.3")}),
        frozenset({Neighbour("10.0.2.0", "02:00:00:00:00:02"), Neighbour("10.0.3.0", "02:00:00:00:00:03")}),
        frozenset({Route(IPv4Network("10.0.2.0/24"), "10.0.2.0"), Route(IPv4Network("10.0.3.0/24"), "10.0.3.0")}),
    )


def test_host_gw_routes_to_the_machines_themselves() -> None:
    found = routes("host-gw", lease(1, "host-gw"), lease(2, "host-gw"))
    assert found == Datapath(routes=frozenset({Route(IPv4Network("10.0.2.0/24"), "10.9.0.2")}))


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        pytest.param("vxlan", lease(2, "host-gw"), id="another backend"),
        pytest.param("vxlan", lease(2, mac=""), id="no MAC published"),
        pytest.param("alloc", lease(2, ""), id="alloc leaves routes to others"),
    ],
)
def test_who_cannot_be_reached(kind: str, other: Lease) -> None:
    assert not routes(kind, lease(1, "" if kind == "alloc" else kind), other)
