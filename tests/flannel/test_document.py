"""The network state as it stands in discoverd: defaults, refusals, and what survives our writes."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import IPv4Network
from typing import Any

import pytest

from flynn.flannel.document import (
    BackendType,
    InvalidNetwork,
    Lease,
    leases_of,
    overlay_of,
    proposal,
    with_lease,
    without_leases,
)

LEASE = {
    "PublicIP": "10.9.0.1",
    "HTTPPort": "5002",
    "BackendType": "vxlan",
    "BackendData": {"VtepMAC": "16:4c:88:29:c0:5b"},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            {"Network": "100.100.0.0/16"}, "24 100.100.1.0 100.100.255.0 vxlan 1 8472", id="defaults of a /16"
        ),
        pytest.param({"network": "10.0.0.7/8"}, "24 10.0.1.0 10.255.255.0 vxlan 1 8472", id="case and host bits"),
        pytest.param({"Network": "10.1.2.0/26"}, "27 10.1.2.32 10.1.2.32 vxlan 1 8472", id="a network below /24"),
        pytest.param(
            {"Network": "10.0.0.0/16", "SubnetLen": 20, "SubnetMin": "10.0.32.0", "SubnetMax": "10.0.64.0"},
            "20 10.0.32.0 10.0.64.0 vxlan 1 8472",
            id="everything said",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"type": "Host-GW"}},
            "24 10.0.1.0 10.0.255.0 host-gw 1 8472",
            id="host-gw",
        ),
        pytest.param(
            {"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7, "Port": 4789}},
            "24 10.0.1.0 10.0.255.0 vxlan 7 4789",
            id="vxlan numbers",
        ),
    ],
)
def test_configuration(config: dict[str, Any], expected: str) -> None:
    overlay = overlay_of({"config": config})
    found = (overlay.subnet_len, overlay.first, overlay.last, overlay.backend.value, overlay.vni, overlay.port)
    assert " ".join(map(str, found)) == expected


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "no Network"),
        ({"Network": "here"}, "wrong"),
        ({"Network": "10.0.0.0/16", "SubnetLen": 15}, "SubnetLen 15"),
        ({"Network": "10.0.0.0/16", "SubnetMin": "10.1.0.0"}, "SubnetMin"),
        ({"Network": "10.0.0.0/16", "SubnetMax": "11.0.0.0"}, "SubnetMax"),
        ({"Network": "10.0.0.0/16", "SubnetMin": "10.0.1.7"}, "beginning"),
        ({"Network": "10.0.0.0/16", "SubnetMin": "10.0.9.0", "SubnetMax": "10.0.1.0"}, "behind"),
        ({"Network": "10.0.0.0/16", "Backend": {"Type": "udp"}}, "udp"),
    ],
)
def test_nonsense_is_named(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidNetwork, match=complaint):
        overlay_of({"config": config})


def test_the_first_write_leaves_out_what_is_not_set() -> None:
    network = IPv4Network("100.100.0.0/16")
    assert proposal(network, BackendType.VXLAN) == {"Network": "100.100.0.0/16", "Backend": {"Type": "vxlan"}}
    assert proposal(network, BackendType.VXLAN, subnet_len=25, vni=7) == {
        "Network": "100.100.0.0/16",
        "SubnetLen": 25,
        "Backend": {"Type": "vxlan", "VNI": 7},
    }


def test_a_lease_of_the_original_is_read() -> None:
    [lease] = leases_of({"subnets": {"100.100.53.0-24": LEASE}})
    assert lease == Lease(
        subnet=IPv4Network("100.100.53.0/24"),
        public_ip="10.9.0.1",
        http_port="5002",
        backend="vxlan",
        vtep_mac="16:4c:88:29:c0:5b",
    )


@pytest.mark.parametrize("document", [{}, {"subnets": None}, {"subnets": {}}])
def test_no_leases_yet(document: dict[str, Any]) -> None:
    assert leases_of(document) == []


@pytest.mark.parametrize(
    ("key", "attributes"),
    [("nonsense", LEASE), ("100.100.1.7-24", LEASE), ("100.100.1.0-24", {}), ("100.100.1.0-24", 7)],
)
def test_what_cannot_be_read_is_skipped(key: str, attributes: object) -> None:
    assert [one.key for one in leases_of({"subnets": {key: attributes, "100.100.2.0-24": LEASE}})] == ["100.100.2.0-24"]


def test_unknown_keys_survive_our_writes() -> None:
    document = {
        "config": {"Network": "100.100.0.0/16"},
        "notes": "kept",
        "subnets": {"100.100.1.0-24": {**LEASE, "Rack": "7"}, "100.100.2.0-24": {"PublicIP": "10.9.0.2", "Rack": "8"}},
    }
    lease = Lease(
        subnet=IPv4Network("100.100.1.0/24"), public_ip="10.9.0.9", renewed_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    written = with_lease(document, lease)
    assert written["notes"] == "kept"
    assert written["subnets"]["100.100.2.0-24"] == document["subnets"]["100.100.2.0-24"]  # type: ignore[index]
    mine = written["subnets"]["100.100.1.0-24"]
    assert (mine["Rack"], mine["PublicIP"], mine["RenewedAt"]) == ("7", "10.9.0.9", "2026-01-01T00:00:00Z")
    assert leases_of(written)[0].renewed_at == lease.renewed_at
    assert set(without_leases(written, [lease])["subnets"]) == {"100.100.2.0-24"}
