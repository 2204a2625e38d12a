"""`log` and `run`: following the output of a job, and running one with this terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import sys
import termios
import tty
import uuid
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

import click

from flynn.host import attach
from flynn.host.cli.access import all_hosts, find_job, host_named, host_of, runs
from flynn.host.client import Attachment
from flynn.host.runtime.spec import DEFAULT_CAPABILITIES
from flynn.jobspec import mountspecs
from flynn.types.artifact import Artifact
from flynn.types.codec import decode
from flynn.types.errors import ApiError
from flynn.types.host import AttachFlag, AttachReq, ContainerConfig, HostJob, VolumeBinding
from flynn.types.release import Mount
from flynn.types.resources import BadLimit, parse_limits
from flynn.types.volume import VolumeRequest

KILL_AFTER_SECONDS = 10.0


@click.command()
@click.option("--init", is_flag=True, help="What the host has to say about the job, too.")
@click.option("-f", "--follow", is_flag=True)
@click.option("-n", "--lines", type=int, default=0, help="Only the last ones; no following.")
@click.option("--split-stderr", is_flag=True)
@click.argument("job_id", metavar="ID")
@runs
async def log(init: bool, follow: bool, lines: int, split_stderr: bool, job_id: str) -> None:
    """Show the output of a job."""
    flags = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.LOGS
    if init:
        flags |= AttachFlag.INIT_LOG
    if follow and not lines:
        flags |= AttachFlag.STREAM
    tail: deque[attach.Data] = deque(maxlen=lines or None)
    async with host_of(job_id) as host:
        job = await find_job(host, job_id)
        if job.status.down:
            flags &= ~AttachFlag.STREAM
        try:
            async with host.attach(AttachReq(job_id=job_id, flags=flags)) as attachment:
                async for frame in attachment.frames():
                    if isinstance(frame, attach.Failure):
                        raise click.ClickException(frame.message)
                    if isinstance(frame, attach.Data):
                        if lines:  # a frame may have several of them, or none: the end of a stream
                            rows = frame.data.removesuffix(b"\n").split(b"\n") if frame.data else []
                            tail += [attach.Data(frame.stream, row + b"\n") for row in rows]
                        else:
                            _write(frame, split_stderr)
        except attach.AttachRefused as error:
            if str(error) not in (attach.JOB_NOT_RUNNING, attach.JOB_ATTACHED):
                raise click.ClickException(job.error or str(error)) from error
            click.echo(str(error), err=True)  # there is just no log of it; scripts count on success
    for frame in tail:
        _write(frame, split_stderr)


def _write(frame: attach.Data, split: bool) -> None:
    target = sys.stderr if split and frame.stream != attach.Stream.STDOUT else sys.stdout
    target.buffer.write(frame.data)
    target.buffer.flush()


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--host", "host_id", default="", help="Default: this machine's.")
@click.option("--bind", default="", help="SRC:DST,... made writable in the container.")
@click.option("--volume", "volume_path", default="", help="Where a new volume is, which goes with the job.")
@click.option("--limits", default="", help="memory=512MB,cpu=500,temp_disk=1G,max_fd=10000")
@click.option("--extra-caps", default="", help="Capabilities besides the usual ones, separated by commas.")
@click.option("--workdir", default="")
@click.option("--hostnet", is_flag=True, help="In the host's network.")
@click.option("--profiles", default="", help="zfs, kvm, loop.")
@click.argument("artifact")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@runs
async def run(
    host_id: str,
    bind: str,
    volume_path: str,
    limits: str,
    extra_caps: str,
    workdir: str,
    hostnet: bool,
    profiles: str,
    artifact: str,
    command: tuple[str, ...],
) -> None:
    """Run a command in an image (an artifact as JSON, or a file with one), connected to this terminal.

    Nothing of it is logged. Exits with the command's status; SIGINT and SIGTERM are passed on, and after 10 s SIGKILL.
    """
    try:
        text = artifact if artifact.lstrip().startswith("{") else Path(artifact).read_text()
        image, resources = decode(text, Artifact), parse_limits([word for word in limits.split(",") if word])
    except (OSError, ApiError) as error:
        raise click.ClickException(f"{artifact[:80]} is no artifact: {error}") from error
    except BadLimit as error:
        raise click.UsageError(str(error)) from error
    extra = [name.strip().upper().removeprefix("CAP_") for name in extra_caps.split(",") if name.strip()]
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    mounts = [
        Mount(location=target, target=source, writeable=True)
        for source, _, target in (item.partition(":") for item in bind.split(",") if item)
    ]
    async with all_hosts() as hosts:
        host_id = host_id or hosts[0].id
        host = await host_named(hosts, host_id)
        volumes = []
        if volume_path:
            made = (await host.create_volume(VolumeRequest())).id
            volumes = [VolumeBinding(target=volume_path, volume=made, writeable=True, delete_on_stop=True)]
        job = HostJob(
            id=f"{host_id}-{uuid.uuid4()}",
            mountspecs=mountspecs([image]),
            resources=resources,
            profiles=[name for name in profiles.split(",") if name],
            config=ContainerConfig(
                args=list(command),
                env={"TERM": os.environ.get("TERM", "xterm"), **({"DISCOVERD": "none"} if hostnet else {})},
                mounts=mounts,
                volumes=volumes,
                linux_capabilities=[*DEFAULT_CAPABILITIES, *extra] if extra else None,
                tty=terminal,
                stdin=True,
                disable_log=True,
                working_dir=workdir,
                host_network=hostnet,
            ),
        )
        flags = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.STDIN | AttachFlag.STREAM
        rows, columns = _window() if terminal else (0, 0)
        request = AttachReq(job_id=job.id, flags=flags, height=rows, width=columns)
        try:
            async with host.attach(request) as attachment:
                await host.add_job(job)
                status = await _converse(attachment, terminal)
        except attach.AttachRefused as error:
            raise click.ClickException(str(error)) from error
    sys.exit(status)


async def _converse(attachment: Attachment, terminal: bool) -> int:
    """Copy both ways until the job ends; returns its exit status."""
    await attachment.ready()
    loop = asyncio.get_running_loop()
    outgoing: asyncio.Queue[attach.ClientFrame] = asyncio.Queue()  # of input it holds one piece at a time
    reading = True

    def typed() -> None:
        nonlocal reading
        data = os.read(sys.stdin.fileno(), 65536)
        outgoing.put_nowait(attach.Data(attach.Stream.STDIN, data))
        reading = bool(data)
        loop.remove_reader(sys.stdin.fileno())

    async def send() -> None:
        while True:
            frame = await outgoing.get()
            await attachment.send(frame)
            if isinstance(frame, attach.Data) and frame.data and reading:
                with suppress(OSError, ValueError):
                    loop.add_reader(sys.stdin.fileno(), typed)

    def interrupted(number: int) -> None:
        outgoing.put_nowait(attach.Signal(number))
        loop.call_later(KILL_AFTER_SECONDS, outgoing.put_nowait, attach.Signal(signal.SIGKILL))

    with ExitStack() as stack:
        if terminal:
            before = termios.tcgetattr(sys.stdin)
            stack.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
            tty.setraw(sys.stdin.fileno())
            loop.add_signal_handler(signal.SIGWINCH, lambda: outgoing.put_nowait(attach.Resize(*_window())))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted, number)
        try:
            loop.add_reader(sys.stdin.fileno(), typed)
            stack.callback(loop.remove_reader, sys.stdin.fileno())
        except (OSError, ValueError):
            # A plain file or /dev/null: there is nothing to wait for.
            reading = False
            outgoing.put_nowait(attach.Data(attach.Stream.STDIN, sys.stdin.buffer.read()))
            outgoing.put_nowait(attach.Data(attach.Stream.STDIN, b""))
        sending = asyncio.ensure_future(send())
        stack.callback(sending.cancel)
        async for frame in attachment.frames():
            match frame:
                case attach.Data():
                    _write(frame, True)
                case attach.Exit(status):
                    return status
                case attach.Failure(message):
                    raise attach.AttachRefused(message)
    raise attach.AttachRefused("the connection to the host was lost")


def _window() -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, b"\0" * 8))
    return rows, columns
