"""A leader that was cut off from the directory goes on until it meets a host that has heard of the next one."""

from __future__ import annotations

import pytest

from flynn.host.jobs.fence import MEMORY_SECONDS, Fence
from flynn.scheduler.events import LeadershipChanged, Overruled, StartDone, StopDone
from flynn.scheduler.model import HostID, Job, JobID, Volume
from flynn.types.errors import PreconditionFailed
from tests.scheduler.test_simulation import START, Simulation


class Divided(Simulation):
    """Hosts that know terms, and a directory that may not reach every scheduler."""

    def __init__(self, seed: int, trouble: float = 0) -> None:
        super().__init__(seed, hosts=3, trouble=trouble)
        self.elections = 0
        self.fences = {host: Fence() for host in self.hosts}
        self.terms = [0, 0]
        self.obeyed: list[int] = []  # which scheduler a start or stop that took effect came from
        self.several_leaders = True

    def elect(self, n: int) -> None:
        """The directory has the scheduler for the leader, and tells only this one."""
        self.elections += 1
        self.terms[n] = self.elections * 10
        self.leader = n
        self.step(n, LeadershipChanged(True))

    def lead(self, n: int) -> None:
        """Another election; now and then the other one does not hear of it for a while."""
        if n == self.leader:
            return
        self.elect(n)
        other = 1 - n

        def hears() -> None:
            if self.leader == n:
                self.terms[other] = 0
                self.step(other, LeadershipChanged(False))

        self.at(self.random.choice([0, 0, 20, 90]), hears)

    def _admitted(self, n: int, host: HostID) -> bool:
        if not self.terms[n]:
            return True  # who does not lead may look
        try:
            self.fences[host].admit(self.terms[n], (self.now - START).total_seconds())
        except PreconditionFailed:
            self.step(n, Overruled())
            return False
        return True

    def list_host(self, n: int, id: HostID) -> None:
        if self._admitted(n, id):
            super().list_host(n, id)

    def start_job(self, n: int, job: Job, volumes: tuple[Volume, ...]) -> None:
        assert job.host is not None
        if self._admitted(n, job.host):
            self.obeyed.append(n)
            super().start_job(n, job, volumes)
        else:
            self.tell(StartDone(job.id, job.host, (), "another one leads"), n)

    def stop_job(self, n: int, id: JobID, host: HostID) -> None:
        if self._admitted(n, host):
            self.obeyed.append(n)
            super().stop_job(n, id, host)
        else:
            self.tell(StopDone(id, host), n)


@pytest.fixture
def divided() -> Divided:
    simulation = Divided(1)
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.elect(0)
    simulation.scale("shop", {"web": 3, "worker": 6})
    simulation.run(5)
    assert set(simulation.obeyed) == {0}
    return simulation


def test_hosts_refuse_the_old_leader_which_then_keeps_quiet(divided: Divided) -> None:
    divided.elect(1)
    divided.run(1)  # the new one lists all hosts before it acts
    divided.obeyed.clear()
    for host in divided.hosts.values():
        for job in host.active()[:2]:
            divided.end_job(host, job.id)  # both see it, and both would replace it
    divided.run(5)
    assert set(divided.obeyed) == {1}
    assert not divided.engines[0].leader
    divided.run(300)
    assert set(divided.obeyed) == {1}
    divided.check()


def test_the_old_leader_leads_again_when_the_directory_says_so(divided: Divided) -> None:
    divided.elect(1)
    divided.run(1)
    divided.sync(0)
    assert not divided.engines[0].leader
    divided.step(1, LeadershipChanged(False))
    divided.elect(0)
    divided.run(5)
    assert divided.engines[0].leader
    divided.scale("shop", {"web": 1, "worker": 2})
    divided.run(5)
    divided.check()


def test_a_directory_that_began_anew_does_not_leave_the_cluster_without_a_leader(divided: Divided) -> None:
    """Its log indexes are small again, so the only leader there is looks like an old one for a while."""
    divided.step(0, LeadershipChanged(False))
    divided.terms[1] = 1
    divided.leader = 1
    divided.step(1, LeadershipChanged(True))
    divided.run(5)
    assert not divided.engines[1].leader
    divided.run(2 * MEMORY_SECONDS)
    assert divided.engines[1].leader
    divided.scale("shop", {"web": 2})
    divided.run(5)
    divided.check()


def test_a_leader_that_nobody_contradicts_goes_on_without_the_directory(divided: Divided) -> None:
    divided.run(600)
    divided.scale("shop", {"web": 2, "worker": 1})
    divided.run(5)
    assert divided.engines[0].leader
    divided.check()


def test_a_fence_forgets_a_leader_that_is_silent() -> None:
    fence = Fence()
    fence.admit(20, 0)
    fence.admit(20, 10)
    with pytest.raises(PreconditionFailed, match="the scheduler of term 20 leads, not that of 3"):
        fence.admit(3, 10 + MEMORY_SECONDS - 1)
    fence.admit(3, 10 + MEMORY_SECONDS)
    with pytest.raises(PreconditionFailed):
        fence.admit(2, 10 + MEMORY_SECONDS)
    fence.admit(21, 10 + MEMORY_SECONDS)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_while_two_believe_that_they_lead_all_is_well_when_they_have_heard(seed: int) -> None:
    simulation = Divided(seed, trouble=0.2)
    for host in simulation.hosts.values():
        simulation.return_host(host)
    simulation.scale("shop", {"web": 2, "worker": 3, "agent": 1, "db": 1})
    simulation.run(1)
    simulation.lead(0)
    simulation.storm(600)
    simulation.clear_up()
    simulation.check()
    assert [bool(engine.leader) for engine in simulation.engines].count(True) == 1
