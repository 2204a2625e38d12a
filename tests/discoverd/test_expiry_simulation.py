"""The directory's own rules on virtual time, from thousands of seeds: leaders change, stop, and their clocks jump.

Three members apply one log, each with a clock of its own. Instances give heartbeats as the client library does: every
3 to 5 s, a failed one again after 0.2 to 0.4 s, a try at most 3 s long. What must hold, whatever becomes of leaders:

- an instance that keeps giving heartbeats is never taken down, though the network may swallow a try now and then: one
  at a time, and none in the seconds after a change of leader, which are shorter for the sake of replacing lost hosts;
- one that fell silent is down within a bound after the last disturbance;
- who leads the service is the oldest instance, at every index, and everybody's events add up to the state.

Raft is not simulated here (that is pysyncobj's, and tested with real processes): a commit by the leader of the highest
term succeeds after a delay, and one by a leader that has been replaced fails.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from flynn.discoverd import expiry, store
from flynn.discoverd.expiry import Heartbeats
from flynn.discoverd.view import View
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

SEEDS = 3000
SECONDS = 90.0
CALM = 45.0  # no disturbance after this moment
HOUR = 3600.0
TRY_SECONDS = 3.0  # until the client gives one try up
GONE_WITHIN = expiry.TTL.total_seconds() + 2.5  # a look every half second, a commit, the grace after the last jump


@dataclass
class Member:
    offset: float = 0.0  # of its clock
    stopped_until: float = 0.0
    term: int = 0  # in which it leads, 0 = it does not
    heartbeats: Heartbeats = field(default_factory=Heartbeats)


@dataclass
class Registrant:
    instance: Instance
    silent_from: float
    swallowed: bool = False  # the try before this one got no answer


class World:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.state = store.Directory()
        self.view = View()
        self.members = [Member() for _ in range(3)]
        self.term = 0
        self.leader: Member = self.members[0]
        self.down: list[tuple[float, str]] = []
        self._order = count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.apply(store.CreateService("web"))
        self.registrants = [
            Registrant(Instance.at(f"10.0.0.{n}:80", "tcp"), SECONDS if n < 4 else self.random.uniform(5, CALM))
            for n in range(6)
        ]
        self.elect()
        for one in self.registrants:
            self.apply(store.PutInstance("web", one.instance))
            self.at(self.random.uniform(0, 5), lambda one=one: self.beat(one))  # type: ignore[misc]
        self.at(self.random.uniform(2, 10), self.disturb)
        for member in self.members:
            self.at(self.random.random(), lambda member=member: self.look(member))  # type: ignore[misc]

    def at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._order), act))

    def run(self) -> None:
        while self._agenda[0][0] < SECONDS:
            self.now, _, act = heapq.heappop(self._agenda)
            act()

    def clock(self, member: Member) -> float:
        return self.now + member.offset

    # The log.

    def apply(self, command: store.Command) -> None:
        index = self.state.index + 1
        try:
            applied = store.apply(self.state, index, command)
        except ApiError:
            self.state = store.skip(self.state, index)
            return
        self.state = applied.state
        for event in applied.events:
            assert event.kind != "down" or event.instance is not None
            if event.kind == "down" and event.instance is not None:
                self.down.append((self.now, event.instance.id))
            self.view.apply(event)
        service = self.state.services["web"]
        assert self.view.instances == service.instances
        assert service.leader == min(service.instances.values(), key=lambda one: one.index, default=None)
        assert (self.view.leader and self.view.leader.id) == (service.leader and service.leader.id)

    # The members.

    def elect(self) -> None:
        able = [member for member in self.members if member.stopped_until <= self.now]
        if not able:
            self.at(0.5, self.elect)
            return
        for member in self.members:
            member.term = 0
            member.heartbeats.cease()
        self.term += 1
        self.leader = self.random.choice(able)
        self.leader.term = self.term
        self.elected = self.now
        self.leader.heartbeats.lead(self.clock(self.leader))

    def look(self, member: Member) -> None:
        """The expiry task of a member; while it is stopped its turn comes late, as soon as it goes on."""
        if member.stopped_until > self.now:
            self.at(member.stopped_until - self.now, lambda: self.look(member))
            return
        now = self.clock(member)
        if member.term == self.term:
            member.heartbeats.interrupted(now)
            gone = member.heartbeats.overdue(self.state, now)
            if gone:
                term = member.term
                self.at(self.random.uniform(0, 0.3), lambda: self.commit(member, term, store.Expire(gone)))
        self.at(expiry.CHECK_EVERY.total_seconds() + self.random.expovariate(200), lambda: self.look(member))

    def commit(self, member: Member, term: int, command: store.Command) -> None:
        if member.term == term == self.term:
            self.apply(command)

    def disturb(self) -> None:
        if self.now > CALM:
            return
        match self.random.randrange(5):
            case 0:
                self.elect()
            case 1:  # killed and back, or stopped for long: another one leads, or the same again
                victim = self.leader
                victim.stopped_until = self.now + self.random.uniform(1, 12)
                self.at(self.random.uniform(0.35, 1.5), self.elect)
            case 2:  # stopped for a moment, too short to be replaced
                self.leader.stopped_until = self.now + self.random.uniform(0.1, 1.4)
            case _:
                victim = self.random.choice([self.leader, *self.members])
                victim.offset += self.random.choice([-HOUR, HOUR, -30, 30, -8, 8, 5, -0.3])
        self.at(self.random.uniform(3, 12), self.disturb)

    # The instances.

    def beat(self, one: Registrant) -> None:
        if self.now >= one.silent_from:
            return
        leader = self.leader
        waits = max(0.0, leader.stopped_until - self.now)  # in the leader's socket, until that goes on
        if 0 < waits < TRY_SECONDS:
            self.at(waits + 0.001, lambda: self.arrive(one, leader))
        elif waits or self.swallows(one):
            one.swallowed = True
            self.at(self.random.choice([0.0, TRY_SECONDS]) + self.random.uniform(0.2, 0.4), lambda: self.beat(one))
        else:
            self.arrive(one, leader)

    def swallows(self, one: Registrant) -> bool:
        settled = self.now > self.elected + expiry.AFTER_TAKEOVER * expiry.TTL.total_seconds()
        return settled and not one.swallowed and self.now < CALM and self.random.random() < 0.15

    def arrive(self, one: Registrant, leader: Member) -> None:
        if leader.term != self.term:  # "not I", says who leads no more
            self.at(self.random.uniform(0.2, 0.4), lambda: self.beat(one))
            return
        one.swallowed = False
        known = self.state.services["web"].instances.get(one.instance.id)
        if known is None:
            self.apply(store.PutInstance("web", one.instance))
        leader.heartbeats.hear(("web", one.instance.id), self.clock(leader))
        self.at(self.random.uniform(3, 5), lambda: self.beat(one))


def check(seed: int) -> None:
    world = World(seed)
    world.run()
    silent = {one.instance.id: one.silent_from for one in world.registrants if one.silent_from < SECONDS}
    for at, instance_id in world.down:
        assert instance_id in silent, f"seed {seed}: a live instance was taken down at {at:.2f}"
        assert at > silent[instance_id], f"seed {seed}: taken down at {at:.2f}, before it fell silent"
    left = set(world.state.services["web"].instances) & set(silent)
    assert not left, f"seed {seed}: silent instances are still there at the end"
    for at, _ in world.down:
        assert at <= CALM + 12 + GONE_WITHIN, f"seed {seed}: a silent instance lived until {at:.2f}"


@pytest.mark.parametrize("chunk", range(6))
def test_whatever_happens_to_leaders_and_clocks_the_living_stay_and_the_dead_go(chunk: int) -> None:
    for seed in range(chunk * SEEDS // 6, (chunk + 1) * SEEDS // 6):
        check(seed)
