"""Who may call an election, message by message; and a member that comes back to a leader who is well."""

from __future__ import annotations

import time

import pytest

from flynn.discoverd.raft.prevote import SILENCE, Canvass, Position, agrees
from tests.discoverd.raft import Follower

LONG_AGO = 10 * SILENCE


@pytest.mark.parametrize(
    ("leads", "silence", "other", "expected"),
    [
        (False, LONG_AGO, (3, 7), True),
        (False, LONG_AGO, (4, 1), True),
        (False, LONG_AGO, (3, 6), False),
        (False, LONG_AGO, (2, 99), False),
        (False, SILENCE / 2, (3, 7), False),
        (True, LONG_AGO, (9, 9), False),
    ],
)
def test_agreement_needs_silence_and_a_log_that_is_as_long(
    leads: bool, silence: float, other: Position, expected: bool
) -> None:
    assert agrees(leads=leads, silence=silence, own=(3, 7), other=other) is expected


def test_a_majority_of_this_round_is_needed() -> None:
    canvass = Canvass()
    first = canvass.begin()
    assert not canvass.hear("b", first, 5)
    assert not canvass.hear("b", first, 5), "the same one twice"
    second = canvass.begin()
    assert not canvass.hear("c", first, 5), "an answer to an earlier question"
    assert not canvass.hear("b", second, 5)
    assert canvass.hear("c", second, 5)
    canvass.end()
    assert not canvass.approved
    assert not canvass.hear("d", second, 3), "a leader was heard meanwhile"


def ask(follower: Follower, log: Position) -> bool:
    """Another member asks; whether this one agrees."""
    before = len(follower.sent)
    follower.transport._onMessageReceived(follower.leaders[0], {"type": "pre_vote", "round": 1, "log": log})
    return len(follower.sent) > before


def test_a_question_changes_nothing(follower: Follower) -> None:
    follower.told(3, (1, 0), [(2, 3)], 1)
    assert not ask(follower, (9, 9)), "the leader has just spoken"
    follower.member.heard -= LONG_AGO
    assert ask(follower, (9, 9))
    assert not ask(follower, (3, 1))
    assert follower.member.raftCurrentTerm == 3


def due(follower: Follower) -> list[str]:
    """The election is due: what is sent in one tick."""
    follower.sent.clear()
    follower.member._election_not_before(-1)
    follower.member._ask_before_election()
    return [message["type"] for message in follower.sent]


def test_without_a_majority_no_term_is_used_up(follower: Follower) -> None:
    follower.told(3, (1, 0), [(2, 3)], 1)
    for _ in range(20):
        assert due(follower) == ["pre_vote", "pre_vote"]
        assert follower.member._SyncObj__raftElectionDeadline > time.monotonic(), "put off"
    assert follower.member.raftCurrentTerm == 3
    agreed = {"type": "pre_vote_agreed", "round": follower.member.canvass.round, "term": 5}
    follower.transport._onMessageReceived(follower.leaders[0], agreed)
    assert follower.member.raftCurrentTerm == 5, "or the one who agrees would not vote"
    assert follower.member._SyncObj__raftElectionDeadline <= time.monotonic(), "at once"
    assert due(follower) == [], "the library calls the election"


def test_a_member_ahead_of_the_leaders_term_calls_an_election_that_makes_them_equal(follower: Follower) -> None:
    follower.told(3, (1, 0), [(2, 3)], 1)
    follower.transport._onMessageReceived(
        follower.leaders[0], {"type": "request_vote", "term": 9, "last_log_index": 9, "last_log_term": 9}
    )
    assert follower.member.raftCurrentTerm == 9
    assert due(follower) == ["pre_vote", "pre_vote"]
    follower.transport._onMessageReceived(
        follower.leaders[1],
        {"type": "append_entries", "term": 3, "commit_index": 1, "prevLogIdx": 2, "prevLogTerm": 3, "entries": []},
    )
    assert due(follower) == []
