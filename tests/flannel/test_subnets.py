"""Who gets which block: tables for the single machine, and many machines at once for what must always hold."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.flannel.document import Lease, leases_of, overlay_of, with_lease
from flynn.flannel.leases import NO_WISH
from flynn.flannel.subnets import OutOfSubnets, claim, free_blocks

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=3)


def me(public_ip: str = "10.9.0.1", host: str = "", subnet: str = str(NO_WISH)) -> Lease:
    return Lease(subnet=IPv4Network(subnet), public_ip=public_ip, host_id=host, backend="vxlan")


def document(*leases: Lease, **config: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"config": {"Network": "10.0.0.0/16", **config}}
    for lease in leases:
        state = with_lease(state, lease)
    return state


def held(subnet: str, public_ip: str, host: str = "", renewed: datetime | None = NOW) -> Lease:
    return Lease(subnet=IPv4Network(subnet), public_ip=public_ip, host_id=host, backend="vxlan", renewed_at=renewed)


def claimed(state: dict[str, Any], lease: Lease, present: Sequence[str] = ()) -> str:
    result = claim(state, overlay_of(state), lease, now=NOW, present=present, choose=lambda free: free[0])
    written = {one.subnet: one for one in leases_of(result.document)}[result.lease.subnet]
    assert written == result.lease and written.renewed_at == NOW
    return str(result.lease.subnet)


ONLY_ONE = {"SubnetMin": "10.0.5.0", "SubnetMax": "10.0.5.0"}


@pytest.mark.parametrize(
    ("state", "lease", "subnet"),
    [
        pytest.param(document(), me(), "10.0.1.0/24", id="the first block is skipped"),
        pytest.param(document(held("10.0.1.0/24", "10.9.0.2")), me(), "10.0.2.0/24", id="what is taken is taken"),
        pytest.param(
            document(held("10.0.7.0/24", "10.9.0.1")), me(), "10.0.7.0/24", id="the same address keeps its block"
        ),
        pytest.param(
            document(held("10.0.7.0/24", "10.9.0.1")),
            me(host="h"),
            "10.0.7.0/24",
            id="a lease from before there were host ids",
        ),
        pytest.param(
            document(held("10.0.7.0/24", "10.9.0.8", "h")),
            me(host="h"),
            "10.0.7.0/24",
            id="the host keeps it with a new address",
        ),
        pytest.param(
            document(held("10.0.7.0/24", "10.9.0.1", "other")),
            me(host="h"),
            "10.0.1.0/24",
            id="two hosts behind one address",
        ),
        pytest.param(document(**ONLY_ONE), me(), "10.0.5.0/24", id="the only block of a narrow range"),
        pytest.param(
            document(held("10.0.5.0/24", "10.9.0.9", renewed=LONG_AGO), **ONLY_ONE),
            me(),
            "10.0.5.0/24",
            id="an abandoned block",
        ),
        pytest.param(
            document(), me(subnet="10.0.9.0/24"), "10.0.9.0/24", id="the block it had, though its lease is gone"
        ),
        pytest.param(
            document(held("10.0.9.0/24", "10.9.0.2")),
            me(subnet="10.0.9.0/24"),
            "10.0.1.0/24",
            id="unless it is given away",
        ),
        pytest.param(
            document(held("10.0.0.0/22", "10.9.0.2")), me(), "10.0.4.0/24", id="blocks of another size are respected"
        ),
    ],
)
def test_claims(state: dict[str, Any], lease: Lease, subnet: str) -> None:
    assert claimed(state, lease) == subnet


@pytest.mark.parametrize(
    ("holder", "present"),
    [
        pytest.param(held("10.0.5.0/24", "10.9.0.9"), (), id="renewed lately"),
        pytest.param(held("10.0.5.0/24", "10.9.0.9", renewed=LONG_AGO), ("10.9.0.9",), id="silent, but a member"),
        pytest.param(held("10.0.5.0/24", "10.9.0.9", renewed=None), (), id="of the original, which never renews"),
    ],
)
def test_a_full_network_takes_nobodys_block(holder: Lease, present: tuple[str, ...]) -> None:
    with pytest.raises(OutOfSubnets):
        claimed(document(holder, **ONLY_ONE), me(), present)


def test_a_sixteen_has_255_blocks() -> None:
    blocks = list(free_blocks(overlay_of(document()), []))
    assert (len(blocks), str(blocks[0]), str(blocks[-1])) == (255, "10.0.1.0/24", "10.0.255.0/24")


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 99)), max_size=60))
def test_blocks_never_overlap_and_stay_with_their_machine(claims: list[tuple[int, int]]) -> None:
    state, holders = document(SubnetMin="10.0.1.0", SubnetMax="10.0.25.0"), {}
    for machine, chance in claims:
        overlay = overlay_of(state)
        lease = me(f"10.9.0.{machine}", f"host{machine}")
        result = claim(state, overlay, lease, now=NOW, present=(), choose=lambda free, n=chance: free[n % len(free)])
        state = result.document
        assert holders.setdefault(machine, result.lease.subnet) == result.lease.subnet
    subnets = [lease.subnet for lease in leases_of(state)]
    assert len(set(subnets)) == len(subnets) == len(holders)
