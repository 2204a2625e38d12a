"""The address pool, by table and by any history of allocations."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flynn.host.network.addresses import AddressError, AddressPool


def pool(prefix: int = 29) -> AddressPool:
    return AddressPool(IPv4Interface(f"10.0.0.1/{prefix}"))


def address(last: int) -> IPv4Address:
    return IPv4Address(f"10.0.0.{last}")


def test_in_order_from_the_first_free_one() -> None:
    addresses = pool()
    assert [addresses.allocate() for _ in range(5)] == [address(n) for n in (2, 3, 4, 5, 6)]


def test_a_freed_one_rests_until_the_round_comes_by() -> None:
    addresses = pool()
    addresses.release(addresses.allocate())
    assert [addresses.allocate() for _ in range(5)] == [address(n) for n in (3, 4, 5, 6, 2)]


def test_exhausted() -> None:
    addresses = pool(30)
    assert addresses.allocate() == address(2)
    with pytest.raises(AddressError, match="no available ip addresses on network"):
        addresses.allocate()


@pytest.mark.parametrize(
    ("last", "text"),
    [
        pytest.param(1, "ip already allocated", id="the bridge"),
        pytest.param(0, "requested ip is out of range", id="network"),
        pytest.param(7, "requested ip is out of range", id="broadcast"),
        pytest.param(77, "requested ip is out of range", id="another network"),
    ],
)
def test_refused_reservations(last: int, text: str) -> None:
    with pytest.raises(AddressError, match=text):
        pool().reserve(address(last))


def test_restored_addresses_are_not_given_out() -> None:
    addresses = AddressPool(IPv4Interface("10.0.0.1/29"), taken=[address(2), address(4)])
    assert [addresses.allocate() for _ in range(3)] == [address(n) for n in (3, 5, 6)]


class NeverTwice(RuleBasedStateMachine):
    """Whatever is allocated and released, no address has two owners, and none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(28)
        self.owned: set[IPv4Address] = set()

    @rule()
    def allocate(self) -> None:
        if len(self.owned) == 13:
            with pytest.raises(AddressError):
                self.pool.allocate()
        else:
            new = self.pool.allocate()
            assert new not in self.owned
            self.owned.add(new)

    @rule(last=st.integers(0, 20))
    def release(self, last: int) -> None:
        if address(last) in self.owned:
            self.owned.discard(address(last))
            self.pool.release(address(last))

    @invariant()
    def inside(self) -> None:
        assert all(address(2) <= one <= address(14) for one in self.owned)


TestNeverTwice = NeverTwice.TestCase
