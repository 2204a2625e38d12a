"""Jobs on a real daemon: what their creators see of them."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from typing import Any

import pytest

from flynn.host import attach
from flynn.host.client import HostClient
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, ImageManifest, Layer, Rootfs
from flynn.types.codec import encode
from flynn.types.errors import Conflict, NotFound, ValidationError
from flynn.types.host import (
    AttachFlag,
    AttachReq,
    ContainerConfig,
    HostJob,
    JobEventKind,
    JobStatus,
    Mountspec,
    NetworkConfig,
    VolumeBinding,
)
from flynn.types.release import Port
from flynn.types.resources import Limit
from flynn.types.volume import VolumeRequest

from .machine import META, TestMachine, ended, eventually, run_to_end

pytestmark = [pytest.mark.root, pytest.mark.slow]

ALL = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.STDIN | AttachFlag.STREAM
OUTPUT = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.LOGS


def job(image: Mountspec, script: str, **fields: Any) -> HostJob:
    """A job that runs a shell script; the other fields are of the job or its config."""
    mine = {name: fields.pop(name) for name in ("partition", "resources", "resurrect", "profiles") if name in fields}
    config = ContainerConfig(args=["sh", "-c", script], **fields)
    return HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config, **mine)


async def output(host: HostClient, job_id: str, flags: int = OUTPUT) -> str:
    """Everything a job has printed."""
    text = b""
    async with asyncio.timeout(10), host.attach(AttachReq(job_id=job_id, flags=flags)) as attachment:
        async for frame in attachment.frames():
            assert isinstance(frame, attach.Data), frame
            text += frame.data
    return text.decode()


async def test_a_job_goes_through_all_its_events_in_order(host: HostClient, image: Mountspec) -> None:
    events = await run_to_end(host, job(image, "exit 3"))
    assert [event.event for event in events] == [
        JobEventKind.CREATE,
        JobEventKind.START,
        JobEventKind.STOP,
        JobEventKind.CLEANUP,
    ]
    last = events[-1].job
    assert last is not None
    assert (last.status, last.exit_status) == (JobStatus.CRASHED, 3)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        pytest.param({"partition": "x"}, 'host: invalid job partition "x"', id="unknown partition"),
        pytest.param({"profiles": ["x"]}, "unknown job profile: x", id="unknown profile"),
        pytest.param({"ports": [Port(proto="x")]}, 'unknown port proto "x"', id="unknown protocol"),
        pytest.param(
            {"volumes": [VolumeBinding(target="/data", volume="nope")]},
            "required volume nope, but that volume does not exist",
            id="missing volume",
        ),
    ],
)
async def test_a_job_that_makes_no_sense_fails_with_the_reason(
    host: HostClient, image: Mountspec, fields: dict[str, Any], error: str
) -> None:
    wanted = job(image, "true", **fields)
    events = await run_to_end(host, wanted)
    assert [event.event for event in events] == [JobEventKind.CREATE, JobEventKind.ERROR, JobEventKind.CLEANUP]
    assert error in ((await host.job(wanted.id)).error or "")


async def test_a_missing_command_is_named(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "")
    wanted = HostJob(id=wanted.id, mountspecs=[image], config=ContainerConfig(args=["foo"]))
    await run_to_end(host, wanted)
    failed = await host.job(wanted.id)
    assert failed.status is JobStatus.FAILED
    assert "executable file not found in $PATH" in (failed.error or "")


async def test_a_layer_that_is_not_what_its_hash_says_is_never_mounted(host: HostClient, image: Mountspec) -> None:
    wrong = Mountspec(type="squashfs", id="wrong", url=image.url, size=image.size, hashes={"sha256": "0" * 64})
    wanted = HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[wrong], config=ContainerConfig(args=["true"]))
    await run_to_end(host, wanted)
    assert (await host.job(wanted.id)).status is JobStatus.FAILED


async def test_refusals_tell_the_caller_at_once(host: HostClient, image: Mountspec) -> None:
    with pytest.raises(NotFound):
        await host.job("node1-nope")
    with pytest.raises(NotFound):
        await host.stop_job("node1-nope")
    with pytest.raises(ValidationError, match="mountspecs"):
        await host.add_job(HostJob(id="node1-x"))
    with pytest.raises(ValidationError):
        await host.configure_network(NetworkConfig(subnet="nonsense"))
    twice = job(image, "true")
    await host.add_job(twice)
    with pytest.raises(Conflict, match="job already exists"):
        await host.add_job(twice)
    await ended(host, twice.id)
    with pytest.raises(Conflict):
        await host.signal_job(twice.id, 15)
    await host.stop_job(twice.id)


async def test_environment_ports_and_output(host: HostClient, image: Mountspec) -> None:
    wanted = job(
        image, "echo $PORT $PORT_1 $EXTERNAL_IP $HOSTNAME; hostname; echo oops >&2; cat /etc/resolv.conf",
        ports=[Port(proto="tcp"), Port(port=8080, proto="tcp")],
    )  # fmt: skip
    await run_to_end(host, wanted)
    ran = await host.job(wanted.id)
    name = wanted.id.partition("-")[2]
    text = await output(host, wanted.id)
    assert text.splitlines()[:2] == [f"5000 8080 {ran.internal_ip} {name}", name]
    assert "oops\n" in text
    assert "nameserver 100.102.7.1\n" in text
    assert await output(host, wanted.id, AttachFlag.STDERR | AttachFlag.LOGS) == "oops\n"


async def test_a_stopped_job_may_say_goodbye_and_is_done(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "trap 'echo bye; exit 0' TERM; echo up; while true; do sleep 0.05; done")
    await host.add_job(wanted)
    await eventually(lambda: _says(host, wanted.id, "up"))
    await host.stop_job(wanted.id)
    assert (await host.job(wanted.id)).status is JobStatus.DONE
    assert await output(host, wanted.id) == "up\nbye\n"


async def _says(host: HostClient, job_id: str, text: str) -> bool:
    return text in await output(host, job_id)


async def test_death_by_a_signal_nobody_sent_through_us_is_a_crash(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "kill -9 $$")
    events = await run_to_end(host, wanted)
    last = events[-1].job
    assert last is not None
    assert (last.status, last.exit_status) == (JobStatus.CRASHED, 137)


async def test_the_out_of_memory_killer_is_reported(host: HostClient, image: Mountspec) -> None:
    wanted = job(
        image, "sleep 0.2; dd if=/dev/zero of=/dev/null bs=200M count=1; echo survived; sleep 0.5",
        resources={"memory": Limit(limit=32 << 20)},
    )  # fmt: skip
    await run_to_end(host, wanted)
    assert "FATAL: a container process was killed" in await output(host, wanted.id, OUTPUT | AttachFlag.INIT_LOG)


async def test_attaching_before_the_job_exists_sees_its_first_byte(host: HostClient, image: Mountspec) -> None:
    """The worked example of the specification."""
    wanted = job(image, 'echo hi; read answer; echo "got $answer" >&2; exit 3', stdin=True, disable_log=True)
    async with asyncio.timeout(20), host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        assert attachment.waiting
        await host.add_job(wanted)
        await attachment.ready()
        await attachment.send(attach.Data(attach.Stream.STDIN, b"yes\n"))
        await attachment.send(attach.Data(attach.Stream.STDIN, b""))
        frames = [frame async for frame in attachment.frames()]
    assert frames[0] == attach.Data(attach.Stream.STDOUT, b"hi\n")
    assert frames[1] == attach.Data(attach.Stream.STDERR, b"got yes\n")
    assert frames[-1] == attach.Exit(3)


async def test_end_of_input_reaches_the_job(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "cat; echo end", stdin=True, disable_log=True)
    async with asyncio.timeout(20), host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        await host.add_job(wanted)
        await attachment.ready()
        await attachment.send(attach.Data(attach.Stream.STDIN, b"x" * 300_000))
        await attachment.send(attach.Data(attach.Stream.STDIN, b""))
        frames = [frame async for frame in attachment.frames()]
    text = b"".join(frame.data for frame in frames if isinstance(frame, attach.Data))
    assert (len(text), text[-4:]) == (300_004, b"end\n")
    assert frames[-1] == attach.Exit(0)


async def test_a_terminal_has_the_size_asked_for_and_is_resized(host: HostClient, image: Mountspec) -> None:
    wanted = job(
        image, "trap 'stty size; exit 4' WINCH; stty size; while true; do sleep 0.05; done", tty=True, stdin=True
    )
    request = AttachReq(job_id=wanted.id, flags=ALL, height=24, width=80)
    text = b""
    async with asyncio.timeout(20), host.attach(request) as attachment:
        await host.add_job(wanted)
        async for frame in attachment.frames():
            if isinstance(frame, attach.Data):
                text += frame.data
                if text == b"24 80\r\n":
                    await attachment.send(attach.Resize(50, 132))
            else:
                assert frame == attach.Exit(4)
    assert text == b"24 80\r\n50 132\r\n"


async def test_a_job_whose_terminal_is_closed_is_stopped(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "trap '' HUP; echo up; while true; do sleep 0.05; done", tty=True, stdin=True)
    async with host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        await host.add_job(wanted)
        await attachment.ready()
    assert await ended(host, wanted.id) is JobStatus.DONE


async def test_signals_through_an_attachment(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "trap 'exit 9' USR1; echo up; while true; do sleep 0.05; done", disable_log=True)
    async with asyncio.timeout(20), host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        await host.add_job(wanted)
        frames = []
        async for frame in attachment.frames():
            frames.append(frame)
            if isinstance(frame, attach.Data):
                await attachment.send(attach.Signal(10))
    assert frames[-1] == attach.Exit(9)


async def test_only_one_may_attach_to_raw_output(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "sleep 30", disable_log=True)
    async with host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        await host.add_job(wanted)
        await attachment.ready()
        with pytest.raises(attach.AttachRefused, match=attach.JOB_ATTACHED):
            async with host.attach(AttachReq(job_id=wanted.id, flags=OUTPUT)):
                pass
    await host.stop_job(wanted.id)
    with pytest.raises(attach.AttachRefused, match=attach.JOB_NOT_RUNNING):
        async with host.attach(AttachReq(job_id=wanted.id, flags=ALL)):
            pass


async def test_waiting_for_a_job_that_fails_is_told_why(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "true", partition="x")
    async with asyncio.timeout(20), host.attach(AttachReq(job_id=wanted.id, flags=ALL)) as attachment:
        await host.add_job(wanted)
        with pytest.raises(attach.AttachRefused, match="invalid job partition"):
            await attachment.ready()


async def test_following_a_log_loses_and_doubles_nothing(host: HostClient, image: Mountspec) -> None:
    wanted = job(image, "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; sleep 0.3; echo tail")
    flags = AttachFlag.STDOUT | AttachFlag.STREAM | AttachFlag.LOGS
    lines: list[bytes] = []
    await host.add_job(wanted)
    async with asyncio.timeout(20), host.attach(AttachReq(job_id=wanted.id, flags=flags)) as attachment:
        async for frame in attachment.frames():
            if isinstance(frame, attach.Data):
                lines += frame.data.splitlines(keepends=True)  # lines that come fast share a frame, whole ones
                assert frame.data.endswith(b"\n")
            else:
                assert frame == attach.Exit(0)
    assert lines == [b"%d\n" % number for number in range(3000)] + [b"tail\n"]


async def test_volumes_outlive_jobs_and_belong_to_one_at_a_time(host: HostClient, image: Mountspec) -> None:
    volume = await host.create_volume(VolumeRequest(meta={"a": "b"}))
    bound = [VolumeBinding(target="/data", volume=volume.id, writeable=True)]
    await run_to_end(host, job(image, "echo kept > /data/f", volumes=bound))
    holder = job(image, "cat /data/f; sleep 30", volumes=bound)
    await host.add_job(holder)
    with pytest.raises(Conflict, match=f"volumes in use: {volume.id}"):
        await host.add_job(job(image, "true", volumes=bound))
    with pytest.raises(Conflict):
        await host.destroy_volume(volume.id)
    await eventually(lambda: _says(host, holder.id, "kept"))
    await host.stop_job(holder.id)
    await run_to_end(
        host, job(image, "true", volumes=[VolumeBinding(target="/d", volume=volume.id, delete_on_stop=True)])
    )
    with pytest.raises(NotFound):
        await host.volume(volume.id)


async def test_a_job_stopped_while_it_waits_never_runs(host: HostClient, image: Mountspec) -> None:
    stuck = Mountspec(type="squashfs", id="stuck", url="http://127.0.0.1:9/x", size=1, hashes=image.hashes)
    wanted = HostJob(id=f"node1-{uuid.uuid4()}", mountspecs=[stuck], config=ContainerConfig(args=["true"]))
    await host.add_job(wanted)
    await host.stop_job(wanted.id)
    assert (await host.job(wanted.id)).status in (JobStatus.DONE, JobStatus.FAILED)


async def test_at_most_25_down_jobs_of_an_app_are_listed(host: HostClient, image: Mountspec) -> None:
    env = {"FLYNN_APP_ID": str(uuid.uuid4())}
    wanted = [job(image, "true", env=env) for _ in range(27)]
    for item in wanted:
        await host.add_job(item)
    for item in wanted:
        await ended(host, item.id)
    await eventually(lambda: _listed(host, env, 25))
    assert (await host.job(wanted[0].id)).status is JobStatus.DONE


async def _listed(host: HostClient, env: dict[str, str], count: int) -> bool:
    return sum(1 for item in (await host.jobs()).values() if item.job.config.env.items() >= env.items()) == count


async def test_the_tool_shows_what_runs(host: HostClient, machine: TestMachine, image: Mountspec) -> None:
    wanted = job(image, "echo hello; sleep 30")
    await host.add_job(wanted)
    await eventually(lambda: _says(host, wanted.id, "hello"))
    listed = await asyncio.to_thread(machine.tool, "ps")
    assert wanted.id in listed.stdout
    shown = await asyncio.to_thread(machine.tool, "log", wanted.id)
    assert shown.stdout == "hello\n"
    stopped = await asyncio.to_thread(machine.tool, "stop", wanted.id)
    assert stopped.stdout == f"{wanted.id} stopped\n"


def artifact(image: Mountspec) -> str:
    layer = Layer(id=image.id, type=SQUASHFS_TYPE, length=image.size, hashes=image.hashes)
    manifest = ImageManifest(rootfs=[Rootfs(layers=[layer])])
    return encode(Artifact(type="flynn", manifest=manifest.document(), layer_url_template=image.url)).decode()


async def test_the_tool_runs_a_command_with_its_input_output_and_status(
    host: HostClient, machine: TestMachine, image: Mountspec
) -> None:
    script = 'read x; echo "out $x"; echo err >&2; exit 5'
    command = machine.command("run", artifact(image), "sh", "-c", script)
    done = await asyncio.to_thread(
        subprocess.run, command, env=machine.environment, input="word\n", capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr, done.returncode) == ("out word\n", "err\n", 5)
    done = await asyncio.to_thread(
        subprocess.run, command, env=machine.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=30
    )
    assert (done.stdout, done.returncode) == (b"out \n", 5)
