"""The checker is checked: histories that are right, and ones that are wrong in exactly one way."""

from __future__ import annotations

from random import Random

import pytest
from pytest import param

from tests.discoverd import history
from tests.discoverd.history import FOREVER, Down, Heartbeat, Outcome, Stream, Told, Write


def ok(invoked: float, returned: float, expected: int, value: str, index: int) -> Write:
    return Write(invoked, returned, expected, value, Outcome(index))


def refused(invoked: float, returned: float, expected: int) -> Write:
    return Write(invoked, returned, expected, "-", Outcome(None))


def unknown(invoked: float, expected: int, value: str) -> Write:
    return Write(invoked, FOREVER, expected, value, None)


@pytest.mark.parametrize(
    ("writes", "right"),
    [
        param([], True, id="nothing happened"),
        param([ok(0, 1, 0, "a", 5), ok(2, 3, 5, "b", 7)], True, id="one after the other"),
        param([ok(0, 1, 0, "a", 5), ok(2, 3, 0, "b", 7)], False, id="created twice"),
        param([ok(0, 9, 5, "b", 7), ok(1, 2, 0, "a", 5)], True, id="side by side, in the order that works"),
        param([ok(3, 4, 0, "a", 5), ok(0, 1, 5, "b", 7)], False, id="replaced before it was written"),
        param([ok(0, 1, 0, "a", 5), ok(2, 5, 5, "b", 7), ok(2, 5, 5, "c", 8)], False, id="two winners of one race"),
        param([ok(0, 1, 0, "a", 5), ok(2, 5, 5, "b", 7), refused(2, 5, 5)], True, id="one winner, one loser"),
        param([ok(0, 1, 0, "a", 5), refused(2, 3, 5)], False, id="refused though it was right"),
        param([ok(0, 1, 0, "a", 5), refused(2, 3, 5), ok(2.5, 4, 5, "b", 6)], True, id="refused, overtaken by another"),
        param([ok(0, 1, 0, "a", 5), unknown(2, 5, "b"), refused(3, 4, 5)], True, id="no answer, but it took effect"),
        param([ok(0, 1, 0, "a", 5), unknown(2, 5, "b"), ok(3, 4, 5, "c", 9)], True, id="no answer, and no effect"),
        param([ok(0, 1, 0, "a", 5), unknown(2, 5, "b"), ok(3, 4, 8, "c", 9)], True, id="no answer; the next one knew"),
        param([ok(0, 1, 0, "a", 5), unknown(8, 5, "b"), refused(3, 4, 5)], False, id="an effect before its cause"),
        param([ok(0, 1, 0, "a", 5), ok(2, 3, 5, "b", 4)], False, id="an index that goes back"),
        param(
            [ok(0, 1, 0, "a", 5), ok(2, 3, 5, "b", 7), refused(4, 5, 7), ok(6, 7, 7, "c", 8)],
            False,
            id="an acknowledged write is gone for a moment",
        ),
        param(
            [ok(0, 1, 0, "a", 5), ok(2, 3, 5, "b", 7), ok(4, 5, 5, "c", 8)], False, id="an acknowledged write is lost"
        ),
    ],
)
def test_linearizable(writes: list[Write], right: bool) -> None:
    assert history.linearizable(writes) is right


def test_a_value_that_somebody_saw_is_no_longer_unknown() -> None:
    writes = [ok(0, 1, 0, "a", 5), unknown(2, 5, "b"), refused(3, 4, 6), ok(5, 6, 5, "c", 9)]
    assert history.linearizable(writes)
    # Somebody has read "b" at index 7: then "c", which replaced "a", cannot have been accepted as well.
    assert not history.linearizable(history.with_indexes(writes, {"b": 7}))


def random_history(random: Random, *, clients: int, writes: int, broken: bool) -> list[Write]:
    """What a correct document answers to concurrent clients; `broken`: one acknowledged write never happened."""
    now, index, document = 0.0, 0, history.NOTHING
    known = [0] * clients
    free_at = [0.0] * clients
    result: list[Write] = []
    broken_at = random.randrange(writes // 2, writes - 8) if broken else -1
    for number in range(writes):
        client = min(range(clients), key=lambda c: free_at[c])
        now = max(now, free_at[client]) + random.uniform(0.1, 1.0)
        invoked = max(free_at[client], now - random.uniform(0, 2))
        returned = now + random.uniform(0, 2)
        free_at[client] = returned
        expected, value = known[client], f"v{number}"
        index += 1
        accepted = document.index == expected
        if number >= broken_at >= 0 and accepted:
            broken_at = -1
            result.append(Write(invoked, returned, expected, value, Outcome(index)))  # acknowledged, and forgotten
            continue
        if accepted:
            document = history.Document(index, value)
        outcome = Outcome(index if accepted else None)
        silent = random.random() < 0.1
        result.append(Write(invoked, FOREVER if silent else returned, expected, value, None if silent else outcome))
        known[client] = document.index or 0
    return result


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_of_a_correct_and_of_a_forgetful_directory(seed: int) -> None:
    assert history.linearizable(random_history(Random(seed), clients=5, writes=120, broken=False))
    assert not history.linearizable(random_history(Random(seed), clients=5, writes=120, broken=True))


A, B, C = "a", "b", "c"
BEGAN = (Told("up", A, 1), Told("leader", A, 1), Told("service_meta", "", 2, "x"))
STORY = (
    Told("up", B, 3),
    Told("update", B, 3, "v"),
    Told("down", A, 1),
    Told("leader", B, 3),
    Told("service_meta", "", 7, "y"),
    Told("up", C, 8),
    Told("down", B, 3),
    Told("leader", C, 8),
)


@pytest.mark.parametrize(
    ("live", "fault"),
    [
        param(STORY, "", id="a whole story"),
        param(STORY[1:], "not there", id="an arrival is missing"),
        param((*STORY, STORY[-3]), "came twice", id="an arrival comes twice"),
        param((*STORY[:3], *STORY[4:]), "a new leader was due", id="a leader is missing"),
        param(STORY[:3], "", id="it may end before the leader is told"),
        param((*STORY[:3], Told("leader", A, 1)), "oldest", id="somebody leads who is not there"),
        param((STORY[0], Told("leader", B, 3)), "oldest is a", id="somebody leads who is not the oldest"),
        param((*STORY[:2], STORY[0]._replace(id=C, index=2)), "older than", id="a registration from the past"),
        param((Told("service_meta", "", 2, "x"),), "from index 2 to 2", id="a document comes twice"),
        param((Told("leader", A, 1),), "twice", id="a leader comes twice"),
        param((Told("down", A, 4), Told("leader", "", 0)), "was not there", id="a later registration goes"),
    ],
)
def test_a_stream_by_itself(live: tuple[Told, ...], fault: str) -> None:
    faults = history.stream_faults(Stream("m1", BEGAN, live))
    assert bool(faults) == bool(fault), faults
    assert fault in " ".join(faults)


@pytest.mark.parametrize(
    ("other", "agree"),
    [
        param(STORY, True, id="the same"),
        param(STORY[2:], True, id="connected later"),
        param(STORY[:5], True, id="ended earlier"),
        param((), True, id="nothing heard"),
        param((*STORY[:2], *STORY[3:]), False, id="a departure left out"),
        param((*STORY[:4], STORY[3], *STORY[4:]), False, id="a leader told twice"),
        param((STORY[1], STORY[0], *STORY[2:]), False, id="another order"),
        param((*STORY[:5], *STORY[6:]), False, id="an arrival left out"),
        param((*STORY[:4], Told("service_meta", "", 7, "z"), STORY[5]), False, id="another document of the same index"),
    ],
)
def test_streams_beside_each_other(other: tuple[Told, ...], agree: bool) -> None:
    streams = [Stream("m1", BEGAN, STORY), Stream("m2", BEGAN, other)]
    assert (history.disagreements(streams) == []) is agree


@pytest.mark.parametrize(
    ("invoked", "returned", "is_lost"),
    [
        param(96.0, 96.1, True, id="acknowledged four seconds before"),
        param(89.0, 89.1, False, id="the last word was eleven seconds ago"),
        param(96.0, 99.9, False, id="acknowledged at the same moment: it may have come just too late"),
        param(101.0, 101.1, False, id="registered again"),
    ],
)
def test_a_registration_that_was_lost(invoked: float, returned: float, is_lost: bool) -> None:
    found = history.lost([Heartbeat("a", invoked, returned)], [Down(100.0, "a")])
    assert bool(found) is is_lost
