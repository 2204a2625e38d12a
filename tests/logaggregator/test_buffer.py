"""Keeping recent lines: order, duplicates, budget, followers, cursors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from flynn.logaggregator.buffer import MESSAGE_OVERHEAD_BYTES, Filter, Follower, Logs
from flynn.logaggregator.rfc5424 import Message, Stream
from flynn.types.codec import replace

START = datetime(2020, 1, 1, tzinfo=UTC)
ALL = Filter()


def message(second: float, seq: int = 0, text: str = "", **other: str) -> Message:
    fields: dict[str, str] = {"host": "h", "app": "a", "process": "web.h-1", "stream": "stdout", **other}
    return Message(
        time=START + timedelta(seconds=second),
        seq=seq,
        text=text.encode(),
        host=fields["host"],
        app=fields["app"],
        process=fields["process"],
        stream=Stream(fields["stream"]),
    )


def texts(messages: list[Message]) -> list[str]:
    return [m.text.decode() for m in messages]


def test_lines_are_kept_in_order_of_time_and_equal_times_in_order_of_number() -> None:
    logs = Logs()
    for second, seq, text in [(1, 1, "b"), (3, 2, "e"), (2, 4, "d"), (2, 3, "c"), (0, 5, "a")]:
        logs.add(message(second, seq, text))
    assert texts(logs.read("a", ALL)) == ["a", "b", "c", "d", "e"]
    assert texts(logs.read("a", ALL, last=2)) == ["d", "e"]
    assert logs.read("unknown", ALL) == []


def test_a_line_sent_twice_is_kept_once_but_two_hosts_may_share_time_and_number() -> None:
    logs = Logs()
    for _ in range(2):
        logs.add(message(1, 7, "x"))
        logs.add(message(1, 8, "y"))
        logs.add(message(1, 7, "z", host="g"))
    assert texts(logs.read("a", ALL)) == ["z", "x", "y"]


def test_thousands_of_lines_of_one_moment_are_nothing_special() -> None:
    compared = 0

    class Moment(datetime):
        """Counts how often it is looked at."""

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

        def __hash__(self) -> int:
            return super().__hash__()

    logs, lines = Logs(), 2000
    for _ in range(2):  # and once more, as after a broken connection
        for seq in range(lines):
            line = message(0, seq)
            logs.add(replace(line, time=Moment.fromtimestamp(line.time.timestamp(), UTC)))
    assert [one.seq for one in logs.read("a", ALL)] == list(range(lines))
    assert compared < lines * 100


def test_a_full_buffer_loses_its_oldest_lines() -> None:
    logs = Logs(max_lines=3)
    for n in range(5):
        logs.add(message(n, n, str(n)))
    logs.add(message(0, 0, "0"))
    assert texts(logs.read("a", ALL)) == ["2", "3", "4"]


def test_what_is_kept_beyond_that_is_not_seen() -> None:
    logs = Logs(max_lines=100)
    for n in range(1000):
        logs.add(message(n, n, str(n)))
        assert len(logs.read("a", ALL)) == min(n + 1, 100)
    assert texts(logs.read("a", ALL)) == texts(list(logs.everything())) == [str(n) for n in range(900, 1000)]
    assert texts(logs.read("a", ALL, last=200)) == [str(n) for n in range(900, 1000)]
    assert logs.size <= 105 * (MESSAGE_OVERHEAD_BYTES + 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from("gh")), max_size=60))
def test_any_order_of_arrival_gives_the_same_as_sorting(arrivals: list[tuple[int, int, str]]) -> None:
    logs = Logs(max_lines=1000)
    for second, seq, host in arrivals:
        logs.add(message(second, seq, host=host))
    kept = [(m.time, m.seq, m.host) for m in logs.read("a", ALL)]
    assert [time for time, _, _ in kept] == sorted(time for time, _, _ in kept)
    assert sorted(kept) == sorted({(START + timedelta(seconds=s), n, h) for s, n, h in arrivals})


def test_the_chattiest_app_pays_when_memory_runs_out() -> None:
    logs = Logs(max_bytes=100_000)
    logs.add(message(0, 0, "quiet", app="quiet"))
    for n in range(2000):
        logs.add(message(n, n, "x" * 100, app="loud"))
    assert texts(logs.read("quiet", ALL)) == ["quiet"]
    assert logs.size <= 100_000
    assert logs.size == sum(MESSAGE_OVERHEAD_BYTES + len(m.text) for m in logs.everything())


def test_filters() -> None:
    logs = Logs()
    logs.add(message(1, 1, "web out"))
    logs.add(message(2, 2, "web err", stream="stderr"))
    logs.add(message(3, 3, "worker", process="worker.h-2"))
    logs.add(message(4, 4, "one-off", process="h-3"))

    def read(**wanted: object) -> list[str]:
        return texts(logs.read("a", Filter(**wanted)))  # type: ignore[arg-type]  # a table of keyword arguments

    assert read(job_id="h-1") == ["web out", "web err"]
    assert read(process_type="worker") == ["worker"]
    assert read(process_type="") == ["one-off"]
    assert read(streams=frozenset({"stderr"})) == ["web err"]
    assert texts(logs.read("a", Filter(process_type="web"), last=1)) == ["web err"]


def test_a_slow_follower_hears_how_much_it_missed() -> None:
    logs = Logs()
    woken: list[bool] = []
    follower = Follower(Filter(process_type="web"), lambda: woken.append(True), limit=2)
    logs.follow("a", follower)
    for n in range(5):
        logs.add(message(n, n, str(n)))
    logs.add(message(9, 9, "other", process="h-1"))
    lines, missed = follower.take()
    assert (texts(lines), missed, len(woken)) == (["0", "1"], 3, 5)
    logs.unfollow("a", follower)
    logs.add(message(10, 10))
    assert follower.take() == ([], 0)


def test_a_cursor_is_the_newest_line_of_a_host() -> None:
    logs = Logs()
    for second, seq in [(5, 900), (6, 1), (6, 3), (6, 2), (4, 950)]:
        logs.add(message(second, seq))
    logs.add(message(1, 1, host="g", app="b"))
    assert logs.cursors == {
        "h": (START + timedelta(seconds=6), 3),  # the daemon restarted: its numbers began anew, time still orders
        "g": (START + timedelta(seconds=1), 1),
    }
