"""Log lines: their form, their files, and readers that miss and repeat nothing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.host.attach import Stream
from flynn.host.logs import record, syslog
from flynn.host.logs.capture import Capture
from flynn.host.logs.files import LogDirectory, is_app_id
from flynn.host.logs.record import MAX_LINE_BYTES, LineSplitter, Source
from flynn.host.logs.shipping import Shipment
from flynn.host.logs.syslog import SyslogConfig
from flynn.types.errors import ValidationError
from flynn.types.host import HostJob

APP, OTHER = "6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11", "11111111-8b22-4d5e-9a07-0f2a3c9d1e11"
SOURCE = Source("host1", APP, "web", "host1-0b4d4b7e-5f7a-4a7e-9a3e-2f1f0d7f4c11")
SPECIMEN = (
    b"151 <190>1 2020-01-02T03:04:05.678900Z host1 6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11"
    b' web.host1-0b4d4b7e-5f7a-4a7e-9a3e-2f1f0d7f4c11 ID1 [flynn seq="42"] hello\n'
)
MOMENT = 1577934245678900


def test_the_specimen_of_the_specification() -> None:
    assert record.encode(SOURCE.header(), Stream.STDOUT, (MOMENT, 42), b"hello") == SPECIMEN
    found = record.decode(SPECIMEN.rstrip(b"\n"))
    assert found is not None
    assert (found.cursor, found.stream, found.text) == ((MOMENT, 42), Stream.STDOUT, b"hello")
    assert found.of_job(SOURCE.job_id.encode())
    assert not found.of_job(b"4c11")


def test_an_empty_line_has_neither_text_nor_blank() -> None:
    line = record.encode(Source("", "", "", "j").header(), Stream.STDERR, (MOMENT, 1), b"")
    assert line.endswith(b'- - j ID2 [flynn seq="1"]\n')
    found = record.decode(line.rstrip(b"\n"))
    assert found is not None
    assert found.text == b""


@pytest.mark.parametrize(
    "damage",
    [b"", b"x", SPECIMEN[:-3], SPECIMEN[20:-1], SPECIMEN.replace(b'seq="42"', b'seq="x2"')[:-1]],
    ids=["nothing", "noise", "cut off", "torn out of its middle", "no number"],
)
def test_damaged_records_are_skipped(damage: bytes) -> None:
    assert record.decode(damage) is None


@given(st.lists(st.binary(max_size=50)), st.sampled_from(list(record.MESSAGE_IDS)))
def test_whatever_a_line_holds_comes_back(texts: list[bytes], stream: Stream) -> None:
    for text in (text.replace(b"\n", b"") for text in texts):
        found = record.decode(record.encode(SOURCE.header(), stream, (MOMENT, 7), text)[:-1])
        assert found is not None
        assert (found.text, found.stream) == (text, stream)


@given(st.lists(st.binary(max_size=50), min_size=1), st.integers(1, 1100), st.sampled_from(list(record.MESSAGE_IDS)))
def test_lines_read_together_are_numbered_one_by_one(texts: list[bytes], number: int, stream: Stream) -> None:
    texts = [text.replace(b"\n", b"") for text in texts]
    header = SOURCE.header()
    together = record.encode_all(header, stream, (MOMENT, number), texts)
    assert together == b"".join(
        record.encode(header, stream, (MOMENT, number + n), text) for n, text in enumerate(texts)
    )


def test_what_neighbours_share_is_not_carried_over_to_others() -> None:
    decoder = record.Decoder()
    other = Source("host2", OTHER, "worker", "host2-1").header()
    found = [
        decoder.decode(line[:-1])
        for line in (
            SPECIMEN,
            record.encode(other, Stream.STDERR, (MOMENT + 1, 43), b"a"),
            b"12 [flynn seq=\n",
            b'17  [flynn seq="44"]\n',
            SPECIMEN,
        )
    ]
    assert found[0] == found[4] == record.decode(SPECIMEN[:-1])
    assert found[1] is not None
    assert (found[1].cursor, found[1].app_id, found[1].process, found[1].stream) == (
        (MOMENT + 1, 43), OTHER.encode(), b"worker.host2-1", Stream.STDERR,
    )  # fmt: skip
    assert found[2:4] == [None, None]


@given(st.lists(st.binary(max_size=30)))
def test_lines_do_not_depend_on_how_they_arrive(chunks: list[bytes]) -> None:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.finish()
    whole = b"".join(chunks)
    assert lines == whole.removesuffix(b"\n").split(b"\n") if whole else lines == []


def test_a_long_line_is_cut() -> None:
    splitter = LineSplitter()
    assert [len(line) for line in splitter.feed(b"x" * 25_000)] == [MAX_LINE_BYTES, MAX_LINE_BYTES]
    assert [len(line) for line in splitter.feed(b"\n")] == [5_000]
    assert [len(line) for line in splitter.feed(b"y" * 10_001 + b"\n")] == [MAX_LINE_BYTES, 1]


def write(logs: LogDirectory, text: str, app: str = APP) -> None:
    header = Source("host1", app, "web", "host1-x").header()
    logs.app(app).append(record.encode(header, Stream.STDOUT, logs.stamp(), text.encode()))
    logs.appended(app)


async def test_a_reader_follows_over_rotations(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path, rotate_bytes=2_000)
    reader = logs.app(APP).reader(history=True)
    seen: list[str] = []
    for number in range(60):
        write(logs, str(number))
        if number % 7 == 0:
            seen += [line.text.decode() for line in reader.available()]
    seen += [line.text.decode() for line in reader.available()]
    assert seen == [str(number) for number in range(60)]
    assert len(list(tmp_path.iterdir())) == 2
    reader.close()
    late = logs.app(APP).reader(history=True)
    texts = [int(line.text) for line in late.available()]
    assert texts == list(range(texts[0], 60))
    logs.close()


async def test_without_history_a_reader_begins_with_the_next_line(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path)
    early = logs.app(APP).reader(history=False)
    write(logs, "old")
    reader = logs.app(APP).reader(history=False)
    write(logs, "new")
    assert [line.text for line in reader.available()] == [b"new"]
    assert [line.text for line in early.available()] == [b"old", b"new"]


async def test_what_a_crash_has_cut_off_does_not_spoil_the_next_line(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path)
    write(logs, "whole")
    logs.close()
    with logs.app(APP).path.open("ab") as file:
        file.write(SPECIMEN[:40])
    logs = LogDirectory(tmp_path)
    write(logs, "after")
    assert [line.text for line in logs.app(APP).reader(history=True).available()] == [b"whole", b"after"]


async def test_captured_output_is_logged_line_by_line_with_its_stream(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path)
    capture = Capture(logs, SOURCE, tmp_path)
    (out, out_end), (err, err_end) = (os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK))
    capture.follow(out, err)
    os.write(out_end, b"one\ntw")
    await asyncio.sleep(0.02)
    os.write(out_end, b"o\nrest")
    os.write(err_end, b"oops\n")
    os.close(out_end)
    os.close(err_end)
    async with asyncio.timeout(5):
        capture.silence()
        await capture.ended.wait()
    found = {(line.stream, line.text) for line in logs.app(APP).reader(history=True).available()}
    assert found == {
        (Stream.STDOUT, b"one"), (Stream.STDOUT, b"two"), (Stream.STDOUT, b"rest"), (Stream.STDERR, b"oops"),
    }  # fmt: skip
    os.close(out)
    os.close(err)


async def test_a_line_that_begins_under_one_daemon_and_ends_under_the_next_stays_one(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path / "logs")
    out, out_end = os.pipe2(os.O_NONBLOCK)
    texts: list[bytes] = []
    for piece in (b"first\nseco", b"nd, still ", b"second\nthi", b"rd"):
        capture = Capture(logs, SOURCE, tmp_path)  # each time a new daemon; the one before was killed
        capture.follow(os.dup(out), None)
        os.write(out_end, piece)
        await asyncio.sleep(0.02)
        for descriptor in list(capture._open):
            asyncio.get_running_loop().remove_reader(descriptor)
        texts = [line.text for line in logs.app(APP).reader(history=True).available()]
    assert texts == [b"first", b"second, still second"]
    os.close(out_end)
    capture = Capture(logs, SOURCE, tmp_path)
    capture.follow(out, None)
    async with asyncio.timeout(5):
        capture.silence()
        await capture.ended.wait()
    texts = [line.text for line in logs.app(APP).reader(history=True).available()]
    assert texts == [b"first", b"second, still second", b"third"]
    os.close(out)


async def test_a_shipment_is_in_order_over_all_apps_and_begins_after_its_cursor(tmp_path: Path) -> None:
    logs = LogDirectory(tmp_path)
    for number in range(10):
        write(logs, str(number), APP if number % 2 else OTHER)
    everything = [line for app in (APP, OTHER) for line in logs.app(app).reader(history=True).available()]
    after = sorted(line.cursor for line in everything)[3]
    shipment = Shipment(logs, after)
    batches = shipment.batches()
    assert [line.text for line in await anext(batches)] == [b"4", b"5", b"6", b"7", b"8", b"9"]
    third = "22222222-8b22-4d5e-9a07-0f2a3c9d1e11"
    write(logs, "late", third)
    async with asyncio.timeout(5):
        assert [line.text for line in await anext(batches)] == [b"late"]
    await batches.aclose()
    shipment.close()


def test_only_apps_have_histories() -> None:
    assert is_app_id(APP)
    assert not is_app_id(f"{APP}-2026-01-01T00-00-00.000")
    assert not is_app_id("flynn-host")


# Syslog sinks

LINE = record.decode(SPECIMEN[:-1])
JOB = HostJob(id=SOURCE.job_id, metadata={"flynn-controller.app_name": "shop", "k": "v"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            SyslogConfig(format="newline"),
            f"<190>1 2020-01-02T03:04:05.678900Z host1 shop web.{SOURCE.job_id} ID1 - hello\n",
            id="app name, no structured data",
        ),
        pytest.param(
            SyslogConfig(format="newline", use_ids=True, structured_data=True),
            SPECIMEN.decode().partition(" ")[2],
            id="as it is",
        ),
        pytest.param(
            SyslogConfig(format="prefixed_newline", use_ids=True, template='{{.ID}} {{index .Metadata "k"}}'),
            f"{SOURCE.job_id} v <190>1 2020-01-02T03:04:05.678900Z host1 {APP} web.{SOURCE.job_id} ID1 - hello\n",
            id="prefix before the line",
        ),
        pytest.param(
            SyslogConfig(format="newline", template='[{{ index .Metadata "k" }}]'),
            f"<190>1 2020-01-02T03:04:05.678900Z host1 shop web.{SOURCE.job_id} ID1 - [v] hello\n",
            id="prefix before the text",
        ),
    ],
)
def test_syslog_forms(config: SyslogConfig, expected: str) -> None:
    assert LINE is not None
    assert syslog.line(LINE, config, lambda _: JOB).decode() == expected


@pytest.mark.parametrize(
    "config",
    [{}, {"url": "http://x"}, {"url": "syslog://"}, {"url": "syslog://x", "template": "{{range}}"}, {"url": 7}],
)
def test_a_sink_that_cannot_work_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        syslog.read(config)


def test_the_port_of_a_sink_has_a_default() -> None:
    assert syslog.read({"url": "syslog+tls://logs.example.com"})[1] == syslog.Target("logs.example.com", 514, True)
