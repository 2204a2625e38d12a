"""Attachments as scenarios, byte by byte (see `dialogue`), and what no scenario can say: many lines, slow clients."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from flynn.host import attach
from flynn.host.client import HostClient
from flynn.identity import Identity
from flynn.types.host import AttachFlag, AttachReq, ContainerConfig, HostJob, JobStatus, Mountspec

from .dialogue import SCENARIOS, Dialogue
from .machine import META, TestMachine, ended, eventually

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.txt")), ids=lambda file: file.stem)
async def test_dialogue(machine: TestMachine, host: HostClient, image: Mountspec, file: Path) -> None:
    await Dialogue(machine, host, image).play(file.read_text())


def job(image: Mountspec, script: str, **config: Any) -> HostJob:
    return HostJob(
        id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META,
        config=ContainerConfig(args=["sh", "-c", script], **config),
    )  # fmt: skip


async def lines_of(host: HostClient, job_id: str, flags: int) -> list[bytes]:
    """All lines until the job ends."""
    text = b""
    async with asyncio.timeout(40), host.attach(AttachReq(job_id=job_id, flags=flags)) as attachment:
        async for frame in attachment.frames():
            if isinstance(frame, attach.Data):
                text += frame.data
    return text.splitlines()


FOLLOW = AttachFlag.STDOUT | AttachFlag.STREAM | AttachFlag.LOGS


async def test_where_history_ends_and_following_begins_no_line_is_lost_or_doubled(
    host: HostClient, image: Mountspec
) -> None:
    """Readers join a job that never stops printing, at forty different moments, one of them before it exists."""
    count = 20_000
    wanted = job(image, f"seq 1 {count // 2}; sleep 0.2; seq {count // 2 + 1} {count}; echo last")
    before = asyncio.ensure_future(lines_of(host, wanted.id, FOLLOW & ~AttachFlag.LOGS))
    await asyncio.sleep(0)
    async with host.attach(AttachReq(job_id=wanted.id, flags=FOLLOW)) as waiting:
        assert waiting.waiting
        await host.add_job(wanted)
        readers = []
        for _ in range(40):
            readers.append(asyncio.ensure_future(lines_of(host, wanted.id, FOLLOW)))
            await asyncio.sleep(0.01)
        everything = [b"%d" % number for number in range(1, count + 1)] + [b"last"]
        assert await before == everything
        for reader in readers:
            assert await reader == everything
    assert await lines_of(host, wanted.id, FOLLOW & ~AttachFlag.STREAM) == everything


async def test_a_client_that_does_not_read_holds_up_neither_job_nor_others(host: HostClient, image: Mountspec) -> None:
    """Its share waits in the log file; of raw output it holds up its own job alone, as a pipe would."""
    talker = job(image, "seq 1 200000; echo done")
    async with host.attach(AttachReq(job_id=talker.id, flags=FOLLOW)) as slow:
        await host.add_job(talker)
        await slow.ready()
        assert await ended(host, talker.id, 30) is JobStatus.DONE
        assert (await lines_of(host, talker.id, FOLLOW))[-1] == b"done"
        text = b""
        async for frame in slow.frames():
            if isinstance(frame, attach.Data):
                text += frame.data
        assert len(text.splitlines()) == 200_001
    raw = job(image, "seq 1 200000; echo done", disable_log=True)
    async with host.attach(AttachReq(job_id=raw.id, flags=FOLLOW)) as slow:
        await host.add_job(raw)
        await slow.ready()
        other = job(image, "echo other")
        await host.add_job(other)
        assert await ended(host, other.id) is JobStatus.DONE
        text = b""
        async for frame in slow.frames():
            if isinstance(frame, attach.Data):
                text += frame.data
        assert text.splitlines()[-1] == b"done"


async def test_clients_that_wait_for_a_job_and_leave_are_forgotten(
    machine: TestMachine, host: HostClient, image: Mountspec
) -> None:
    """Fifty of them, gone before the job comes: it starts without delay, and nothing of them is left."""
    assert machine.process is not None
    descriptors = Path(f"/proc/{machine.process.pid}/fd")

    async def back_to_normal() -> bool:
        return len(list(descriptors.iterdir())) <= before + 2

    wanted = job(image, "echo hi", disable_log=True)
    before = len(list(descriptors.iterdir()))
    for _ in range(50):
        async with host.attach(AttachReq(job_id=wanted.id, flags=FOLLOW)) as attachment:
            assert attachment.waiting
    await eventually(back_to_normal)
    await host.add_job(wanted)
    assert await ended(host, wanted.id, 5) is JobStatus.DONE


async def test_what_is_no_request_for_an_attachment_is_refused(machine: TestMachine, host: HostClient) -> None:
    context = Identity.load(machine.state / "identity").client_context()
    reader, writer = await asyncio.open_connection(machine.ip, 1113, ssl=context)
    writer.write(b"POST /attach HTTP/1.1\r\nHost: x\r\nUpgrade: flynn-attach/0\r\nContent-Length: 1\r\n\r\n{")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert await reader.readexactly(13) == b"invalid JSON\n"
    # ... and what comes behind it is a request after all.
    writer.write(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
