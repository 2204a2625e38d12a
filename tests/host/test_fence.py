"""The orders of a scheduler that has been replaced, at a real host."""

from __future__ import annotations

import pytest

from flynn.host.client import HostClient
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.scheduler.mandate import Mandate
from flynn.types.errors import PreconditionFailed
from flynn.types.host import Mountspec
from flynn.types.volume import VolumeRequest

from .machine import TestMachine
from .test_daemon_jobs import job

pytestmark = [pytest.mark.root, pytest.mark.slow]


async def test_a_host_that_has_heard_of_a_later_leader_takes_no_orders_of_the_one_before(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    mandate = Mandate()
    identity = Identity.load(machine.state / "identity")
    async with HttpClient(f"https://{machine.ip}:1113", tls=identity, live_headers=mandate.headers) as http:
        scheduler = HostClient(http)
        mandate.term = 7
        running = job(image, "sleep 60")
        await scheduler.add_job(running)
        mandate.term = 9
        assert running.id in await scheduler.jobs()  # the new one lists before it does anything
        mandate.term = 7
        late = job(image, "sleep 60")
        for order in (
            scheduler.add_job(late),
            scheduler.stop_job(running.id),
            scheduler.deregister_job(running.id),
            scheduler.create_volume(VolumeRequest()),
            scheduler.jobs(),
        ):
            with pytest.raises(PreconditionFailed, match="the scheduler of term 9 leads, not that of 7"):
                await order
        mandate.term = 0  # one that does not lead, and says so, may look
        listed = await scheduler.jobs()
        assert running.id in listed and late.id not in listed
        assert not await host.volumes()
        await host.stop_job(running.id)  # others who start and stop jobs have no term
