"""flynn-host as its users meet it: a real daemon in its own network namespace, spoken to over TLS as by another host.

The peer is runc on the same files, without a network, and conmon where output is logged: what Podman and CRI-O are made
of. Our side includes what a job has here and a bare container has not: the record on disk, an address on a bridge, a
write layer, events, TLS.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from bench import processes, runc
from bench.rows import Row, table
from flynn.discoverd.client import Discoverd
from flynn.host import attach
from flynn.host.attach import Stream
from flynn.host.client import HostClient
from flynn.host.logs.files import LogDirectory
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.host import AttachFlag, AttachReq, ContainerConfig, DiscoverdConfig, HostJob, JobEventKind
from flynn.types.instance import DiscoverdEvent, EventKind
from flynn.types.release import HealthCheck, Port, Service
from tests.host.machine import APP, META, TestMachine, busybox_image, sweep

ROUNDS = 25
PAUSE = 0.1  # between starts: what one start costs, not how many fit into a second
PARALLEL = 50
IDLE_JOBS = 100
IDLE_SECONDS = 20.0
LINE_BYTES, FILE_LINES, REPEATS = 100, 100_000, 5
LINES = FILE_LINES * REPEATS
TRANSFER_MB = 256
ECHO_MB = 128
SHIM_MB = 10.0  # documented for containerd-shim
LIMIT = 60.0  # seconds for any one step
SERVICE = "bench-web"


def rows() -> list[Row]:
    sweep()
    work = Path(tempfile.mkdtemp(prefix="flynn-bench-"))
    try:
        image = busybox_image(work, {"lines": _lines()})
        with ExitStack() as undo:
            machine = TestMachine(work / "node", image, number=3)
            machine.directory.mkdir()
            undo.callback(machine.remove)
            machine.plug_in()
            machine.start()
            return asyncio.run(_Bench(work, machine).measure())
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _lines() -> bytes:
    """Numbered lines like those of a web server, each exactly `LINE_BYTES` long with its newline."""
    text = '10.1.2.3 "GET /items HTTP/1.1" 200 5123 "-" "Mozilla/5.0" 12 ms'
    return b"".join(f"{number:08d} {text}".ljust(LINE_BYTES - 1, ".").encode() + b"\n" for number in range(FILE_LINES))


class _Bench:
    def __init__(self, work: Path, machine: TestMachine) -> None:
        self._work, self._machine = work, machine
        self._root = work / "root"
        self._numbers = iter(range(100_000))
        assert machine.process is not None
        self._daemon = machine.process.pid

    async def measure(self) -> list[Row]:
        async with self._machine.client() as host, self._discoverd() as registry:
            await self._machine.configure(host)
            await host.configure_discoverd(
                DiscoverdConfig(url=f"{self._machine.ip}:1111", dns=f"{self._machine.ip}:53")
            )
            # The layer is in use, as on a node at work: what is measured is a job, not mounting its image.
            await self._start_all(host, 1)
            return [
                *await self._starts(host),
                await self._registration(host, registry),
                *await self._logs(host),
                *await self._attachments(host),
                *await self._many(host),
            ]

    def _job(self, *arguments: str, **fields: Any) -> HostJob:
        return HostJob(
            id=f"node1-{uuid.uuid4()}",
            mountspecs=[self._machine.image],
            metadata=META,
            config=ContainerConfig(args=list(arguments), **fields),
        )

    def _bundle(self, *arguments: str) -> tuple[Path, int]:
        number = next(self._numbers)
        return runc.write_bundle(self._work / f"bundle{number}", self._root, arguments), number

    @asynccontextmanager
    async def _discoverd(self) -> AsyncIterator[Discoverd]:
        """A real discoverd on the node, as a process instead of a job."""
        machine, directory = self._machine, self._work / "discoverd"
        ca = ClusterCA.load(machine.state / "identity")
        ca.issue_job("discoverd", "app", "discoverd", [machine.ip]).write(directory)
        process = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/run/netns/{machine.name}", sys.executable, "-m", "flynn.discoverd.main",
            "-data-dir", str(self._work / "discoverd-data"), "-notify", "",
            env={"PATH": os.environ["PATH"], "EXTERNAL_IP": machine.ip, "FLYNN_IDENTITY": str(directory)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            identity = Identity.load(machine.state / "identity")
            async with Discoverd.connect(f"{machine.ip}:1111", identity=identity) as registry:
                async with asyncio.timeout(LIMIT):
                    await registry.create(SERVICE)
                yield registry
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()

    # Starting

    async def _starts(self, host: HostClient) -> list[Row]:
        bundle, _ = self._bundle("/bin/true")
        ours, accepted, peer = [], [], []
        for _ in range(ROUNDS):
            peer.append(await asyncio.to_thread(runc.run, bundle, next(self._numbers)))
            await asyncio.sleep(PAUSE)
            whole, since_answer = await self._start(host, self._job("true"))
            ours.append(whole)
            accepted.append(since_answer)
            await asyncio.sleep(PAUSE)
        against = "runc run, no network"
        return [
            Row(
                name="job: PUT accepted -> process runs, p50", ours=statistics.median(accepted),
                peer=statistics.median(peer), unit="ms", budget=1.0, against=against,
            ),
            Row(
                name="job: PUT accepted -> process runs, p90", ours=_p90(accepted), peer=_p90(peer),
                unit="ms", against=against,
            ),
            Row(
                name="job: PUT sent -> process runs, p50", ours=statistics.median(ours), peer=statistics.median(peer),
                unit="ms", against=against,
            ),
            Row(
                name="job: PUT sent -> process runs, p90", ours=_p90(ours), peer=_p90(peer), unit="ms", against=against
            ),
        ]  # fmt: skip

    async def _start(self, host: HostClient, job: HostJob) -> tuple[float, float]:
        """Milliseconds until the process runs, from sending the PUT and from its answer; the job is cleaned up then."""
        began = answered = running = 0.0
        async with asyncio.timeout(LIMIT), host.subscribed(job.id) as events:
            began = time.perf_counter()
            await host.add_job(job)
            answered = time.perf_counter()
            async for event in events:
                if event.event is JobEventKind.START:
                    running = time.perf_counter()
                elif event.event is JobEventKind.ERROR:
                    raise RuntimeError(f"a job failed: {event.job and event.job.error}")
                elif event.event is JobEventKind.CLEANUP:
                    break
        return (running - began) * 1000, (running - answered) * 1000

    async def _registration(self, host: HostClient, registry: Discoverd) -> Row:
        """A job with a health check that listens at once: until a watcher of discoverd is told of it."""
        took = []
        events = registry.watch(SERVICE)
        try:
            for _ in range(ROUNDS):
                service = Service(name=SERVICE, create=True, check=HealthCheck(type="tcp"))
                job = self._job(
                    "sh", "-c", "exec nc -ll -p $PORT -e /bin/true",
                    ports=[Port(port=8080, proto="tcp", service=service)],
                )  # fmt: skip
                begin = time.perf_counter()
                await host.add_job(job)
                await _until(events, EventKind.UP)
                took.append((time.perf_counter() - begin) * 1000)
                await host.signal_job(job.id, signal.SIGKILL)
                await _until(events, EventKind.DOWN)
        finally:
            await events.aclose()
        return Row(name="job: PUT -> healthy, in discoverd, p50", ours=statistics.median(took), unit="ms")

    async def _many(self, host: HostClient) -> list[Row]:
        """Many jobs started at once, and what they cost while nothing happens."""
        peer = await asyncio.to_thread(self._runc_parallel)
        begin = time.perf_counter()
        await self._start_all(host, PARALLEL)
        ours = time.perf_counter() - begin
        jobs = await host.jobs(active=True)
        weights = [processes.pss_mb(job.pid) for job in jobs.values() if job.pid is not None]
        await self._start_all(host, IDLE_JOBS - PARALLEL - 1)  # one has run from the beginning
        await asyncio.sleep(2)
        inits = [job.pid for job in (await host.jobs(active=True)).values() if job.pid is not None]
        daemon, containers = processes.cpu_seconds(self._daemon), processes.cpu_seconds(*inits)
        await asyncio.sleep(IDLE_SECONDS)
        daemon = processes.cpu_seconds(self._daemon) - daemon
        containers = processes.cpu_seconds(*inits) - containers
        return [
            Row(
                name=f"{PARALLEL} jobs at once, until all run", ours=ours, peer=peer, unit="s", against="runc run",
                budget=1.0,
            ),
            Row(
                name=f"init memory per container (PSS, {PARALLEL} running)", ours=statistics.mean(weights), unit="MB",
                limit=SHIM_MB, budget=0.8, against="containerd-shim, documented",
            ),
            Row(
                name=f"flynn-host idle with {IDLE_JOBS} jobs", ours=100 * daemon / IDLE_SECONDS, unit="% of a core",
            ),
            Row(
                name=f"inits of {IDLE_JOBS} idle jobs", ours=100 * containers / IDLE_SECONDS, unit="% of a core",
            ),
        ]  # fmt: skip

    async def _start_all(self, host: HostClient, count: int) -> None:
        waiting = {job.id: job for job in (self._job("sleep", "1000") for _ in range(count))}
        async with asyncio.timeout(LIMIT), host.subscribed() as events, asyncio.TaskGroup() as group:
            for job in waiting.values():
                group.create_task(host.add_job(job))
            pending = set(waiting)
            async for event in events:
                if event.event is JobEventKind.START:
                    pending.discard(event.job_id)
                elif event.event is JobEventKind.ERROR and event.job_id in pending:
                    raise RuntimeError(f"a job failed: {event.job and event.job.error}")
                if not pending:
                    return

    def _runc_parallel(self) -> float:
        bundle, _ = self._bundle(*runc.STARTED)
        numbers = [next(self._numbers) for _ in range(PARALLEL)]
        found: list[bytes] = []
        with ExitStack() as stack:
            begin = time.perf_counter()
            for pipe in [stack.enter_context(runc.started(bundle, number)).stdout for number in numbers]:
                assert pipe is not None
                found.append(pipe.readline())
            took = time.perf_counter() - begin
        if any(line != b"\n" for line in found):
            raise RuntimeError("not every container of runc has started")
        return took

    # Logs

    async def _logs(self, host: HostClient) -> list[Row]:
        peer, peer_cpu = await asyncio.to_thread(self._conmon)
        alone, alone_cpu = await self._log(host)
        self._check_log()
        followed, followed_cpu = await self._log_followed(host)
        per_million = 1e6 / LINES
        return [
            Row(
                name=f"log of one job: lines of {LINE_BYTES} bytes into the file", ours=LINES / alone,
                peer=LINES / peer, unit="lines/s", against="conmon, k8s-file",
            ),
            Row(
                name="log of one job: CPU of the daemon per million lines", ours=alone_cpu * per_million,
                peer=peer_cpu * per_million, unit="s", against="conmon, k8s-file",
            ),
            Row(name="log of one job: into the file and to a follower", ours=LINES / followed, unit="lines/s"),
            Row(
                name="log with a follower: CPU of the daemon per million lines", ours=followed_cpu * per_million,
                unit="s",
            ),
        ]  # fmt: skip

    def _printing(self) -> tuple[str, ...]:
        return ("cat", *["/lines"] * REPEATS)

    async def _log(self, host: HostClient) -> tuple[float, float]:
        """Seconds until all is in the file, and of the daemon's CPU."""
        self._forget_log()
        before, begin = processes.cpu_seconds(self._daemon), time.perf_counter()
        await self._start(host, self._job(*self._printing()))
        return time.perf_counter() - begin, processes.cpu_seconds(self._daemon) - before

    async def _log_followed(self, host: HostClient) -> tuple[float, float]:
        self._forget_log()
        job = self._job(*self._printing())
        request = AttachReq(job_id=job.id, flags=AttachFlag.STDOUT | AttachFlag.STREAM)
        text = bytearray()
        async with asyncio.timeout(LIMIT), host.attach(request) as attachment:
            before, begin = processes.cpu_seconds(self._daemon), time.perf_counter()
            await host.add_job(job)
            await attachment.ready()
            # Read now and taken apart later: what is measured is the daemon.
            while not text.endswith(attach.encode(attach.Exit(0))):
                chunk = await attachment.connection.read(1 << 20)
                if not chunk:
                    raise RuntimeError("the attachment broke off")
                text += chunk
            took, cpu = time.perf_counter() - begin, processes.cpu_seconds(self._daemon) - before
        _check(_payload(text).split(b"\n")[:-1], "the follower")
        return took, cpu

    def _forget_log(self) -> None:
        """Two files of 100 MB are kept; what is counted has to fit into them."""
        for file in (self._machine.directory / "log").glob(f"{APP}*"):
            file.unlink()

    def _check_log(self) -> None:
        reader = LogDirectory(self._machine.directory / "log").app(APP).reader(history=True)
        try:
            _check([record.text for record in reader.available()], "the log")
        finally:
            reader.close()

    def _conmon(self) -> tuple[float, float]:
        bundle, number = self._bundle(*self._printing())
        log = self._work / "conmon.log"
        with runc.logged(bundle, number, self._work, log) as (conmon, ended):
            begin = time.perf_counter()
            subprocess.run(["runc", "start", runc.name(number)], check=True)
            cpu = processes.cpu_seconds(conmon)
            deadline = time.monotonic() + LIMIT
            while not ended.exists():
                try:
                    cpu = processes.cpu_seconds(conmon)
                except OSError:
                    pass  # it has ended between the two looks
                if time.monotonic() > deadline:
                    raise RuntimeError("conmon has not ended")
                time.sleep(0.005)
            took = time.perf_counter() - begin
        _check(_conmon_lines(log.read_bytes()), "conmon's log")
        log.unlink()
        return took, cpu

    # Attaching

    async def _attachments(self, host: HostClient) -> list[Row]:
        peer_out = await asyncio.to_thread(self._runc_output)
        peer_echo = await asyncio.to_thread(self._runc_echo)
        return [
            Row(
                name="attach: output of a job, over TLS", ours=await self._output(host), peer=peer_out, unit="MB/s",
                against="runc run, a pipe",
            ),
            Row(
                name="attach: stdin -> cat -> stdout, over TLS", ours=await self._echo(host), peer=peer_echo,
                unit="MB/s", against="runc run, two pipes",
            ),
        ]  # fmt: skip

    def _pouring(self) -> tuple[str, ...]:
        return ("dd", "if=/dev/zero", "bs=65536", f"count={TRANSFER_MB * 16}")

    async def _output(self, host: HostClient) -> float:
        job = self._job(*self._pouring(), disable_log=True)
        request = AttachReq(job_id=job.id, flags=AttachFlag.STDOUT | AttachFlag.STREAM)
        received = 0
        async with asyncio.timeout(LIMIT), host.attach(request) as attachment:
            await host.add_job(job)
            await attachment.ready()
            begin = time.perf_counter()
            async for frame in attachment.frames():
                if isinstance(frame, attach.Data):
                    received += len(frame.data)
        return _rate(received, TRANSFER_MB, begin)

    async def _echo(self, host: HostClient) -> float:
        job = self._job("cat", disable_log=True, stdin=True)
        flags = AttachFlag.STDIN | AttachFlag.STDOUT | AttachFlag.STREAM
        received, block = 0, bytes(1 << 16)
        async with asyncio.timeout(LIMIT), host.attach(AttachReq(job_id=job.id, flags=flags)) as attachment:
            await host.add_job(job)
            await attachment.ready()

            async def feed() -> None:
                for _ in range(ECHO_MB * 16):
                    await attachment.send(attach.Data(Stream.STDIN, block))
                await attachment.send(attach.Data(Stream.STDIN, b""))

            begin = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                group.create_task(feed())
                async for frame in attachment.frames():
                    if isinstance(frame, attach.Data):
                        received += len(frame.data)
        return _rate(received, ECHO_MB, begin)

    def _runc_output(self) -> float:
        bundle, number = self._bundle("/bin/sh", "-c", "echo; exec " + " ".join(self._pouring()) + " 2>/dev/null")
        with runc.started(bundle, number) as process:
            assert process.stdout is not None
            os.read(process.stdout.fileno(), 1)
            begin = time.perf_counter()
            return _rate(_drained(process.stdout.fileno()), TRANSFER_MB, begin)

    def _runc_echo(self) -> float:
        bundle, number = self._bundle("/bin/sh", "-c", "echo; exec cat")
        block = bytes(1 << 16)
        with runc.started(bundle, number, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            stdin = process.stdin

            def feed() -> None:
                for _ in range(ECHO_MB * 16):
                    stdin.write(block)
                stdin.close()

            os.read(process.stdout.fileno(), 1)
            feeding = threading.Thread(target=feed)
            begin = time.perf_counter()
            feeding.start()
            rate = _rate(_drained(process.stdout.fileno()), ECHO_MB, begin)
            feeding.join()
            return rate


async def _until(events: AsyncIterator[DiscoverdEvent], kind: EventKind) -> None:
    async with asyncio.timeout(LIMIT):
        async for event in events:
            if event.kind is kind:
                return


def _drained(descriptor: int) -> int:
    received = 0
    while chunk := os.read(descriptor, 1 << 16):
        received += len(chunk)
    return received


def _rate(received: int, expected_mb: int, begin: float) -> float:
    """MB/s; all of it has to have come."""
    took = time.perf_counter() - begin
    if received != expected_mb << 20:
        raise RuntimeError(f"{received} bytes instead of {expected_mb << 20}")
    return expected_mb / took


def _payload(frames: bytearray) -> bytes:
    """The data of a stream of data frames; the other frames have none."""
    found, position = [], 0
    while position < len(frames):
        if frames[position] != attach.FrameType.DATA:
            break
        length = int.from_bytes(frames[position + 2 : position + 6], "big")
        found.append(frames[position + 6 : position + 6 + length])
        position += 6 + length
    return b"".join(found)


def _conmon_lines(log: bytes) -> list[bytes]:
    """Lines of `<time> stdout <F or P> <text>`; P is a part, which the next record continues."""
    lines, begun = [], b""
    for record in log.splitlines():
        _, _, tag, text = record.split(b" ", 3)
        begun += text
        if tag == b"F":
            lines.append(begun)
            begun = b""
    return lines


def _check(lines: Iterable[bytes], where: str) -> None:
    """Every line, once, whole and in order."""
    numbers = [int(line[:8]) for line in lines if len(line) == LINE_BYTES - 1]
    if numbers != list(range(FILE_LINES)) * REPEATS:
        raise RuntimeError(f"{where} has {len(numbers)} whole lines of {LINES}, or not in order")


def _p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


if __name__ == "__main__":
    print(table(rows()))
