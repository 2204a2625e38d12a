"""Which block a machine gets, and who may lose one. Pure: the caller brings time and chance.

A machine keeps its block: across restarts, address changes (it is known by host id first) and long absences. A block
is taken back only when its holder has not renewed for a day *and* is not a member of the cluster any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import IPv4Network
from itertools import islice

from flynn.flannel.document import Document, Lease, Overlay, leases_of, with_lease, without_leases

LEASE_LIFETIME = timedelta(hours=24)
RENEW_EVERY = timedelta(hours=1)
CANDIDATES = 100  # to choose from, so that machines starting together rarely choose the same

Choose = Callable[[Sequence[IPv4Network]], IPv4Network]


class OutOfSubnets(Exception):
    """Every block of the network is leased."""


@dataclass(frozen=True, slots=True)
class Claim:
    document: Document
    lease: Lease


def claim(
    document: Document,
    overlay: Overlay,
    me: Lease,
    *,
    now: datetime,
    present: Collection[str],
    choose: Choose,
) -> Claim:
    """The document with a lease for `me`, whose subnet only matters as a wish: the block it had before, if it is free.

    Args:
        present: public addresses of the cluster's members, whose leases are never taken back.

    Raises:
        OutOfSubnets: even after taking back what is abandoned.
    """
    leases = leases_of(document)
    held = _held(leases, me)
    if held is not None:
        lease = replace(me, subnet=held.subnet, renewed_at=now)
        return Claim(with_lease(document, lease), lease)
    document = without_leases(document, [lease for lease in leases if is_abandoned(lease, now, present)])
    leases = leases_of(document)
    free = list(islice(free_blocks(overlay, leases), CANDIDATES))
    if not free:
        raise OutOfSubnets(f"all blocks of {overlay.network} are leased ({len(leases)})")
    wish = me.subnet if me.subnet in set(free_blocks(overlay, leases)) else None
    lease = replace(me, subnet=wish or choose(free), renewed_at=now)
    return Claim(with_lease(document, lease), lease)


def free_blocks(overlay: Overlay, leases: Sequence[Lease]) -> Iterator[IPv4Network]:
    taken = [lease.subnet for lease in leases]
    exactly = {subnet for subnet in taken if subnet.prefixlen == overlay.subnet_len}
    odd = [subnet for subnet in taken if subnet.prefixlen != overlay.subnet_len]  # from before SubnetLen was changed
    size = 1 << (32 - overlay.subnet_len)
    for address in range(int(overlay.first), int(overlay.last) + 1, size):
        block = IPv4Network((address, overlay.subnet_len))
        if block not in exactly and not any(block.overlaps(subnet) for subnet in odd):
            yield block


def is_abandoned(lease: Lease, now: datetime, present: Collection[str]) -> bool:
    """A lease without a renewal time was written by the original, which never renews: it stays."""
    silent = lease.renewed_at is not None and now - lease.renewed_at > LEASE_LIFETIME
    return silent and lease.public_ip not in present


def _held(leases: Sequence[Lease], me: Lease) -> Lease | None:
    by_id = (lease for lease in leases if me.host_id and lease.host_id == me.host_id)
    by_address = (lease for lease in leases if lease.public_ip == me.public_ip and lease.host_id in ("", me.host_id))
    return next(by_id, None) or next(by_address, None)
