"""The log on disk: whatever was synced is there again, whatever was torn is gone, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flynn.discoverd.raft.journal import DurableJournal, Entry

ENTRIES: list[Entry] = [(b"one", 1, 1), (b"", 2, 1), (b"three" * 1000, 3, 2)]


def filled(path: Path, entries: list[Entry] = ENTRIES) -> DurableJournal:
    journal = DurableJournal(path)
    for entry in entries:
        journal.add(*entry)
    journal.sync()
    return journal


def reopened(path: Path) -> list[Entry]:
    return DurableJournal(path)[:]


def test_entries_come_back(tmp_path: Path) -> None:
    filled(tmp_path / "log")
    assert reopened(tmp_path / "log") == ENTRIES


def test_only_what_was_synced_is_promised(tmp_path: Path) -> None:
    journal = filled(tmp_path / "log")
    journal.add(b"four", 4, 2)
    assert journal.dirty
    assert reopened(tmp_path / "log") == ENTRIES
    journal.sync()
    assert not journal.dirty
    assert len(reopened(tmp_path / "log")) == 4


def test_the_end_can_be_taken_back_and_written_anew(tmp_path: Path) -> None:
    journal = filled(tmp_path / "log")
    journal.deleteEntriesFrom(1)
    journal.add(b"other", 2, 3)
    journal.sync()
    assert reopened(tmp_path / "log") == journal[:] == [ENTRIES[0], (b"other", 2, 3)]


def test_what_comes_again_was_never_away(tmp_path: Path) -> None:
    """A leader repeats itself: a crash in the middle of that must not lose what was confirmed before."""
    journal = filled(tmp_path / "log")
    journal.deleteEntriesFrom(1)
    assert reopened(tmp_path / "log") == ENTRIES
    journal.add(*ENTRIES[1])
    assert not journal.dirty
    assert reopened(tmp_path / "log") == journal[:] == ENTRIES


def test_the_beginning_goes_into_a_snapshot(tmp_path: Path) -> None:
    journal = filled(tmp_path / "log")
    journal.deleteEntriesTo(2)
    journal.add(b"four", 4, 2)
    journal.sync()
    assert reopened(tmp_path / "log") == journal[:] == [ENTRIES[2], (b"four", 4, 2)]


def test_term_and_vote_come_back(tmp_path: Path) -> None:
    journal = DurableJournal(tmp_path / "log")
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (0, None)
    journal.setCurrentTerm(7, "10.0.0.1:1110")
    again = DurableJournal(tmp_path / "log")
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "10.0.0.1:1110")


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"somebody's diary")
    with pytest.raises(ValueError, match="not a Raft log"):
        DurableJournal(tmp_path / "log")


@pytest.mark.parametrize("lost", range(1, 5045, 97))
def test_a_torn_end_is_cut_off_at_the_last_whole_entry(tmp_path: Path, lost: int) -> None:
    filled(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-lost])
    journal = DurableJournal(tmp_path / "log")
    known = journal[:]
    assert known == ENTRIES[: len(known)]
    assert len(known) == 2 or (len(known) < 2 and lost > 5000)
    journal.add(b"next", len(known) + 1, 3)
    journal.sync()
    assert reopened(tmp_path / "log") == [*known, (b"next", len(known) + 1, 3)]


def test_a_flipped_bit_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path / "log")
    raw = bytearray((tmp_path / "log").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "log").write_bytes(raw)
    assert reopened(tmp_path / "log") == ENTRIES[:2]


Step = st.one_of(
    st.tuples(st.just("add"), st.binary(max_size=40)),
    st.tuples(st.just("again"), st.tuples(st.integers(0, 8), st.booleans())),
    st.tuples(st.just("to"), st.integers(0, 8)),
    st.tuples(st.just("reopen"), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(Step, max_size=25))
def test_it_is_a_list_that_survives(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, object]]) -> None:
    path = tmp_path_factory.mktemp("journal") / "log"
    journal, model, index = DurableJournal(path), [], 0
    for step, argument in steps:
        match step, argument:
            case "add", bytes(command):
                index += 1
                journal.add(command, index, 1)
                model.append((command, index, 1))
            case "again", (int(position), bool(same)) if position < len(model):
                command, at, term = model[position]
                entry = (command, at, term if same else term + 1)
                journal.deleteEntriesFrom(position)
                journal.add(*entry)
                if not same:
                    model[position:] = [entry]
                    index = at
            case "to", int(position):
                journal.deleteEntriesTo(position)
                model = model[position:]
                index = model[-1][1] if model else index
            case "reopen", _:
                journal._destroy()
                journal = DurableJournal(path)
        assert journal[:] == model
    journal._destroy()
    assert reopened(path) == model
