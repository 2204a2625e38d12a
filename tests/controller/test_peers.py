"""Replacing the peers of a database cluster: one step at a time, from whatever is found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze
from flynn.controller.deploy.peers import (
    Chain,
    Done,
    Member,
    Start,
    Stop,
    Unfit,
    Wait,
    check_fit,
    is_restored,
    next_step,
)
from flynn.types.codec import ZERO_TIME
from flynn.types.instance import Instance


def chain(text: str, frozen: str = "") -> Chain:
    """`O/N/O N?/ N!`: primary, sync, asyncs by release; `?` lacks something, `!` is not listed; after `+` outside."""
    inside, _, outside = text.partition("+")

    def members(words: list[str], first: int) -> tuple[Member, ...]:
        return tuple(
            Member(f"{word[0]}{number}", word[0], "!" not in word, "has not caught up" if "?" in word else "")
            for number, word in enumerate(words, first)
        )

    words = inside.replace("/", " ").split()
    return Chain(members(words, 0), members(outside.split(), len(words)), frozen)


@pytest.mark.parametrize(
    ("text", "expected", "step"),
    [
        pytest.param("O/O/O", 0, "start", id="a new one comes before an old one goes"),
        pytest.param("O/O/O", 1, "wait: a new peer has not come up", id="one that was asked for is awaited"),
        pytest.param("O/O/O + N", 1, "wait: a new peer has not been taken in: it has no role yet"),
        pytest.param("O/O/O N?", 1, "wait: async 1: has not caught up", id="until it has caught up nobody goes"),
        pytest.param("O/O/O N", 1, "stop O2", id="asyncs first"),
        pytest.param("O/O/O O? N", 1, "stop O3", id="one that lags is no loss"),
        pytest.param("O/O/O! N", 1, "wait: async 0 is gone, which the primary has to notice"),
        pytest.param("O/O/N", 1, "start"),
        pytest.param("O/O/N N", 2, "stop O1", id="then the sync"),
        pytest.param("O/O!/N N", 2, "wait: the sync is not there"),
        pytest.param("O?/N/N", 2, "wait: the primary: has not caught up", id="the primary takes no writes yet"),
        pytest.param("O/N/N", 2, "start"),
        pytest.param("O/N/N N", 3, "stop O0", id="the primary last"),
        pytest.param("O!/N/N N", 3, "wait: the primary is not there"),
        pytest.param("N?/N/N", 3, "wait: the primary: has not caught up"),
        pytest.param("N/N/N", 3, "done"),
        pytest.param("O/O", 0, "start", id="a cluster that has lost a peer gets a new one first"),
        pytest.param("O/O/N", 1, "start", id="and is whole before an old one goes"),
        pytest.param("O/O?/O", 0, "wait: the sync: has not caught up", id="nothing is changed unless the pair works"),
        pytest.param("O/O/O?", 0, "start", id="an old async that lags is not waited for"),
        pytest.param("O/O/O? N?", 1, "stop O2", id="it goes, for the new one may hang on it"),
        pytest.param("O/O?/O? N?", 1, "wait: the sync: has not caught up", id="but not while the pair is broken"),
        pytest.param("O/O/N O O", 1, "stop O3", id="an old one that came back goes again"),
        pytest.param("N/O/N N", 3, "stop O1", id="after a takeover in the middle: by role, not by history"),
        pytest.param("O/N/N N", 3, "stop O0", id="taken up again: no second start"),
        pytest.param("N/N/X N", 3, "stop X2", id="of whatever release"),
    ],
)
def test_step(text: str, expected: int, step: str) -> None:
    assert told(next_step(chain(text), "N", 3, expected)) == step


def told(step: object) -> str:
    match step:
        case Start():
            return "start"
        case Done():
            return "done"
        case Stop(member):
            return f"stop {member.id}"
        case Wait(reason):
            return f"wait: {reason}"
    raise AssertionError(step)


def test_a_frozen_cluster_is_left_alone() -> None:
    assert told(next_step(chain("O/O/O N", "maintenance"), "N", 3, 1)) == "wait: the cluster is frozen: maintenance"


@pytest.mark.parametrize(
    ("text", "expected", "restored"),
    [
        pytest.param("O/O/O", 3, True, id="nothing was changed"),
        pytest.param("O/O/O?", 3, True, id="what was not whole before need not be now"),
        pytest.param("O/O/O + N", 3, True, id="a new peer without a role is no loss"),
        pytest.param("O/O", 2, False, id="one that was stopped is to come back"),
        pytest.param("O/O/O N", 3, False),
        pytest.param("N/N/N", 3, False),
    ],
)
def test_when_going_back_is_over(text: str, expected: int, restored: bool) -> None:
    assert is_restored(chain(text), "O", 3, expected) is restored


ONE = Instance.at("10.0.0.1:5432", "tcp")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "missing sirenia cluster state"),
        (ClusterState(generation=1, primary=ONE, singleton=True), "sirenia cluster in singleton mode"),
        (
            ClusterState(generation=1, primary=ONE, sync=ONE, freeze=Freeze(frozen_at=ZERO_TIME, reason="moving")),
            "sirenia cluster is frozen: moving",
        ),
    ],
)
def test_what_no_replacement_begins_with(state: ClusterState | None, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        check_fit(state)


@dataclass
class Play:
    """A cluster that does what sirenia's rules do, in no time, and an operator who follows `next_step`."""

    members: list[Member]
    wanted: int
    number: int = 100
    asked: int = 0  # of the new release
    story: list[str] = field(default_factory=list)

    def add(self, release: str) -> None:
        self.members.append(Member(f"{release}{self.number}", release))
        self.number += 1

    def drop(self, member: Member) -> None:
        self.members.remove(member)  # the next one moves up, whoever is lost: sync to primary, async to sync

    def whole(self) -> int:
        return sum(1 for member in self.members if member.present and not member.lacks)

    @property
    def shape(self) -> str:
        primary, sync, *asyncs = (member.release for member in self.members)
        return f"{primary}/{sync}/[{','.join(asyncs)}]"

    def step(self, release: str) -> bool:
        """Follow the rule once; False when it is done."""
        fresh = sum(1 for member in self.members if member.release == release)
        match next_step(Chain(tuple(self.members)), release, self.wanted, self.asked):
            case Done():
                return False
            case Start():
                assert self.asked < self.wanted
                self.asked += 1
                self.add(release)
            case Stop(member):
                assert member.release != release, "a new peer is never stopped"
                assert len(self.members) > self.wanted or fresh >= self.wanted
                self.drop(member)
            case Wait(reason):
                if self.asked > fresh:  # lost: the scheduler replaces it
                    self.add(release)
                else:
                    self.members = [replace(member, lacks="") for member in self.members]
                self.story.append(reason)
        self.story.append(self.shape)
        return True


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (2, "O/O/[N] O/N/[] O/N/[N] N/N/[]"),
        (3, "O/O/[O,N] O/O/[N] O/O/[N,N] O/N/[N] O/N/[N,N] N/N/[N]"),
        (
            5,
            "O/O/[O,O,O,N] O/O/[O,O,N] O/O/[O,O,N,N] O/O/[O,N,N] O/O/[O,N,N,N] O/O/[N,N,N] O/O/[N,N,N,N]"
            " O/N/[N,N,N] O/N/[N,N,N,N] N/N/[N,N,N]",
        ),
    ],
)
def test_the_states_a_cluster_passes_through(size: int, shapes: str) -> None:
    play = Play([Member(f"O{number}", "O") for number in range(size)], size)
    while play.step("N"):
        pass
    assert " ".join(play.story) == shapes


@settings(max_examples=500)
@given(st.integers(2, 5), st.data())
def test_whatever_is_lost_on_the_way_it_ends_with_new_peers_only_and_no_old_one_goes_too_early(
    size: int, data: st.DataObject
) -> None:
    play = Play([Member(f"O{number}", "O") for number in range(size)], size)
    for _ in range(data.draw(st.integers(0, 12))):
        what = data.draw(st.sampled_from(["step", "step", "lose", "lag", "old comes back"]))
        if what == "step" and not play.step("N"):
            break
        victim = data.draw(st.integers(0, len(play.members) - 1))
        if what == "lose" and len(play.members) > 2:
            play.drop(play.members[victim])
        if what == "lag":
            play.members[victim] = replace(play.members[victim], lacks="has not caught up")
        if what == "old comes back" and len(play.members) < size + 2:
            play.add("O")
    for _ in range(60):
        before = play.whole()
        if not play.step("N"):
            break
        # Of what is whole, a step takes away at most what is beyond the wanted number.
        assert play.whole() >= min(before, size)
    else:
        raise AssertionError(f"no end: {play.story}")
    assert {member.release for member in play.members} == {"N"}
    assert len(play.members) >= size


@given(st.integers(2, 5), st.integers(0, 30))
def test_from_any_point_the_way_back_leads_to_the_old_release(size: int, steps: int) -> None:
    play = Play([Member(f"O{number}", "O") for number in range(size)], size)
    for _ in range(steps):
        play.step("N")
    play.asked = sum(1 for member in play.members if member.release == "O")
    for _ in range(60):
        if is_restored(Chain(tuple(play.members)), "O", size, play.asked):
            break
        before = play.whole()
        play.step("O")
        assert play.whole() >= min(before, size)
    assert [member.release for member in play.members] == ["O"] * size
