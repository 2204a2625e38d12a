"""A follower and the messages of leaders that come late, twice, in parts, or after another leader's.

The library is driven by hand: what a transport would deliver is delivered, nothing is ticked and nothing is timed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flynn.discoverd.raft.journal import DurableJournal
from tests.discoverd.raft import NO_OP, Follower


def entries(first: int, last: int, term: int) -> list[tuple[int, int]]:
    return [(index, term) for index in range(first, last + 1)]


START = (1, 0)  # the entry every log begins with


def test_entries_are_taken_confirmed_and_committed(follower: Follower) -> None:
    answer = follower.told(1, START, entries(2, 5, 1), commit=4)
    assert (answer["next_node_idx"], answer["success"]) == (6, True)
    assert (follower.log, follower.committed) == (entries(2, 5, 1), 4)


def test_what_a_gone_leader_left_is_not_committed_by_the_word_of_the_next(follower: Follower) -> None:
    follower.told(1, START, entries(2, 10, 1), commit=7)
    # The next leader has other entries from 8 on, committed already, and sends its log in parts.
    answer = follower.told(2, (2, 1), entries(3, 7, 1), commit=20)
    assert answer["next_node_idx"] == 8, "it confirms what the message speaks for"
    assert follower.committed == 7
    answer = follower.told(2, (7, 1), entries(8, 9, 2), commit=20)
    assert (answer["next_node_idx"], follower.committed) == (10, 9)
    assert follower.log == [*entries(2, 7, 1), *entries(8, 9, 2)]


def test_a_mere_sign_of_life_does_not_commit_what_it_does_not_speak_for(follower: Follower) -> None:
    follower.told(1, START, entries(2, 10, 1), commit=2)
    answer = follower.told(2, (5, 1), [], commit=9)
    assert (answer["next_node_idx"], follower.committed) == (6, 5)
    assert follower.log == entries(2, 10, 1)


def test_a_message_that_was_overtaken_takes_nothing_back(follower: Follower, caplog: pytest.LogCaptureFixture) -> None:
    follower.told(1, START, entries(2, 3, 1), commit=3)
    follower.told(1, (3, 1), entries(4, 9, 1), commit=9)
    for late in (entries(2, 3, 1), entries(2, 5, 1), []):
        answer = follower.told(1, START, late, commit=3)
        assert answer["next_node_idx"] == 2 + len(late)
        assert (follower.log, follower.committed) == (entries(2, 9, 1), 9)
    follower.told(1, (6, 1), entries(7, 11, 1), commit=9)
    assert follower.log == entries(2, 11, 1)
    assert caplog.records == []


def test_a_different_entry_takes_back_all_behind_it(follower: Follower) -> None:
    follower.told(1, START, entries(2, 10, 1), commit=2)
    follower.told(2, (3, 1), entries(4, 4, 2), commit=4)
    assert (follower.log, follower.committed) == ([*entries(2, 3, 1), (4, 2)], 4)


def test_a_gap_or_another_past_is_refused(follower: Follower) -> None:
    follower.told(1, START, entries(2, 5, 1), commit=2)
    assert follower.told(1, (9, 1), entries(10, 11, 1), commit=11)["reset"] is True
    assert follower.told(2, (5, 2), entries(6, 6, 2), commit=6)["reset"] is True
    assert (follower.log, follower.committed) == (entries(2, 5, 1), 2)


def test_an_observer_follows_whoever_leads_and_keeps_its_ballot(tmp_path: Path) -> None:
    """It was a member once, was removed while it was away, and has called elections that nobody listened to."""
    before = Follower(tmp_path)
    before.member._SyncObj__setCurrentTerm(7, "somebody")
    before.member._doDestroy()
    observer = Follower(tmp_path, observing=True)
    heard = observer.member.heard = -1.0
    try:
        assert observer.told(3, START, entries(2, 4, 3), commit=4)["success"] is True
        assert (observer.log, observer.committed) == (entries(2, 4, 3), 4)
        assert observer.member.heard > heard
        assert observer.told(7, (4, 3), entries(5, 5, 7), commit=5)["success"] is True
    finally:
        observer.member._doDestroy()
    journal = DurableJournal(tmp_path / "raft.log")
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (7, "somebody")


def test_a_member_does_not_hear_a_leader_of_the_past(follower: Follower) -> None:
    follower.told(2, START, entries(2, 4, 2), commit=4)
    follower.member.heard = -1.0
    with pytest.raises(IndexError):
        follower.told(1, START, entries(2, 9, 1), commit=9)  # it is not even answered
    assert (follower.log, follower.member.heard) == (entries(2, 4, 2), -1.0)


def test_the_last_part_of_a_large_entry_commits_no_more_than_that(follower: Follower) -> None:
    import pickle

    follower.told(1, START, entries(2, 10, 1), commit=2)
    large = pickle.dumps((NO_OP + b"large", 3, 2))
    for part, data in (("start", large[:9]), ("process", large[9:20]), ("finish", large[20:])):
        message = {
            "type": "append_entries", "transmission": part, "data": data, "term": 2, "commit_index": 9,
            "prevLogIdx": 2, "prevLogTerm": 1,
        }  # fmt: skip
        follower.transport._onMessageReceived(follower.leaders[0], message)
    assert (follower.log, follower.committed) == ([(2, 1), (3, 2)], 3)
