"""Many machines racing for blocks on one directory, and a lease that somebody removes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from flynn.aio.clock import SystemClock
from flynn.discoverd.memory import MemoryRegistry
from flynn.flannel.agent import Agent, LostSubnet
from flynn.flannel.document import Lease, leases_of, overlay_of
from flynn.flannel.leases import NO_WISH, SERVICE, NetworkState
from flynn.types.codec import replace
from flynn.types.errors import ServiceUnavailable
from flynn.types.instance import ServiceMeta

PROPOSED = {"Network": "10.0.0.0/16", "Backend": {"Type": "alloc"}}


class Slow(MemoryRegistry):
    """Every call takes a turn of the loop, so that racing machines really race; some fail for the moment."""

    calls = 0

    async def get_meta(self, service: str) -> ServiceMeta | None:
        await asyncio.sleep(0)
        Slow.calls += 1
        if Slow.calls % 7 == 0:
            raise ServiceUnavailable("an election")
        return await MemoryRegistry.get_meta(self, service)


def machine(n: int) -> Lease:
    return Lease(subnet=NO_WISH, public_ip=f"10.9.0.{n}", host_id=f"host{n}")


async def test_machines_starting_together_get_blocks_of_their_own() -> None:
    registry = Slow()
    states = [NetworkState(registry, SystemClock(), PROPOSED) for _ in range(20)]
    async with asyncio.timeout(20):
        overlays = await asyncio.gather(*(state.overlay() for state in states))
        leases = await asyncio.gather(
            *(state.ensure_lease(overlays[n], machine(n)) for n, state in enumerate(states, start=0))
        )
    assert len({lease.subnet for lease in leases}) == 20
    meta = await MemoryRegistry.get_meta(registry, SERVICE)
    assert meta is not None and meta.data["config"] == PROPOSED
    assert {lease.subnet for lease in leases_of(meta.data)} == {lease.subnet for lease in leases}


async def test_the_first_configuration_stays() -> None:
    registry = MemoryRegistry()
    first = await NetworkState(registry, SystemClock(), PROPOSED).overlay()
    other = await NetworkState(registry, SystemClock(), {"Network": "10.7.0.0/16"}).overlay()
    assert first == other == overlay_of({"config": PROPOSED})


async def running_agent(registry: MemoryRegistry) -> Agent:
    state = NetworkState(registry, SystemClock(), PROPOSED)
    overlay = await state.overlay()
    return Agent(state, overlay, lambda: None, await state.ensure_lease(overlay, machine(1)))


async def rewrite(registry: MemoryRegistry, data: object) -> None:
    meta = await registry.get_meta(SERVICE)
    assert meta is not None
    await registry.put_meta(SERVICE, replace(meta, data=data))


async def test_a_lease_that_is_removed_is_written_again() -> None:
    registry = MemoryRegistry()
    agent = await running_agent(registry)
    following = asyncio.ensure_future(agent.follow())
    await rewrite(registry, {"config": PROPOSED, "subnets": {}})
    async with asyncio.timeout(5):
        while not (found := leases_of((await registry.get_meta(SERVICE)).data)):  # type: ignore[union-attr]
            await asyncio.sleep(0)
    assert found[0].subnet == agent.lease.subnet
    following.cancel()


async def test_a_block_given_to_somebody_else_ends_the_process() -> None:
    registry = MemoryRegistry()
    agent = await running_agent(registry)
    taken = {"PublicIP": "10.9.0.9", "HostID": "other", "RenewedAt": datetime.now(UTC).isoformat()}
    await rewrite(registry, {"config": PROPOSED, "subnets": {agent.lease.key: taken}})
    with pytest.raises(LostSubnet):
        async with asyncio.timeout(5):
            await agent.follow()


async def test_a_directory_that_lost_everything_gets_configuration_and_lease_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flynn.flannel.agent.LOOK_EVERY", 0.01)
    registry = MemoryRegistry()
    agent = await running_agent(registry)
    watching = asyncio.ensure_future(agent.watch_over())
    await registry.remove(SERVICE)
    async with asyncio.timeout(5):
        while (meta := await registry.get_meta(SERVICE)) is None:
            await asyncio.sleep(0.01)
    assert meta.data["config"] == PROPOSED
    assert [lease.subnet for lease in leases_of(meta.data)] == [agent.lease.subnet]
    watching.cancel()
