"""The life of one job on this host, as a procedure of named steps: prepare, create, resume, watch, clean up.

Every step may be repeated, so a daemon that finds a half-started job goes on or starts over, and one that finds a
half-cleaned job cleans up again. What states there are and what may follow what is decided in `jobs.lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from flynn.aio.clock import Clock
from flynn.host import steps
from flynn.host.certificates import JobCertificates
from flynn.host.discovery import Discovery
from flynn.host.disk import StateDisk
from flynn.host.jobs import environment, partitions, profiles, resurrection
from flynn.host.jobs.book import JobBook
from flynn.host.jobs.container import BadMount, Prepared, container_spec, memory_bytes, scratch_bytes
from flynn.host.jobs.environment import HostFacts
from flynn.host.jobs.lifecycle import (
    AddressAssigned,
    Broken,
    ContainerMade,
    Ended,
    Happening,
    Launched,
    StopAsked,
    Withdrawn,
)
from flynn.host.layers import LayerStore
from flynn.host.live import LiveJob, LiveJobs
from flynn.host.logs.capture import Capture
from flynn.host.logs.files import LogDirectory
from flynn.host.logs.record import Source
from flynn.host.network.addresses import AddressError
from flynn.host.network.listening import ports_in_use
from flynn.host.networking import NodeNetwork
from flynn.host.runtime import loop
from flynn.host.runtime.layers import LayerError, LayerMounts
from flynn.host.runtime.runtime import KILLED, Container, ContainerError, Exit, NotRunning, Runtime, State
from flynn.host.runtime.scratch import ScratchPool
from flynn.host.runtime.spec import Device, Network
from flynn.host.services.departures import Departures
from flynn.host.services.registration import JobServices
from flynn.host.volumes import mounts
from flynn.host.volumes.book import VolumeBook
from flynn.host.volumes.mounts import Mounted
from flynn.host.volumes.provider import VolumeError
from flynn.types.errors import ApiError
from flynn.types.host import META_APP, META_TYPE, ActiveJob, HostJob, JobStatus
from flynn.types.resources import MIB

log = logging.getLogger(__name__)

T = TypeVar("T")

TERM_GRACE = timedelta(seconds=30)  # between SIGTERM and SIGKILL
OUTPUT_GRACE = timedelta(seconds=2)  # for reading what an ended job has printed last
UNATTACHED_GRACE = timedelta(seconds=30)  # how long the output of a `disable_log` job waits for an attacher
DESTROY_TRIES = 20
DESTROY_PAUSE = timedelta(milliseconds=500)

OOM_NOTICE = 'lvl=crit msg="FATAL: a container process was killed due to lack of available memory" component=flynn-host'

EXPECTED = (
    AddressError,
    ApiError,
    BadMount,
    ContainerError,
    LayerError,
    OSError,
    VolumeError,
    environment.UnknownProto,
    partitions.InvalidPartition,
    profiles.ProfileError,
)
"""What can be wrong with a job or its host; anything else is a bug of ours and is logged with its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The parts of the host that running a job takes."""

    facts: HostFacts
    partitions: Mapping[str, int]
    directory: Path  # <state>/jobs
    runtime: Runtime
    layers: LayerStore
    mounts: LayerMounts
    scratch: ScratchPool
    disk: StateDisk
    volumes: VolumeBook
    network: NodeNetwork
    discovery: Discovery
    departures: Departures
    certificates: JobCertificates
    logs: LogDirectory
    live: LiveJobs
    book: JobBook
    launching: asyncio.Semaphore  # how many jobs are launched at a time
    clock: Clock
    new_job_id: Callable[[], str]


class _Stopped(Exception):
    """The job was asked to stop before there was a container."""


class JobRun:
    """One job on its way. `run` is the whole procedure; `stop` may be called at any time."""

    def __init__(self, machine: Machine, job_id: str) -> None:
        self._machine, self._id = machine, job_id
        self._stop = asyncio.Event()
        self._services: JobServices | None = None
        self._scratch: Path | None = None
        self._loops: list[int] = []  # devices that are the job's alone
        self._reason: str | None = None  # why the host has killed the job
        self._oom_reported = False
        self.container: Container | None = None
        self.finished = asyncio.Event()  # cleaned up
        self.heir: HostJob | None = None  # the job that takes its place, once it has ended

    @property
    def _job(self) -> ActiveJob:
        return self._machine.book[self._id]

    def stop(self) -> None:
        """Ask for the end: SIGTERM, 30 s, SIGKILL. Returns at once."""
        if not self._job.status.down and not self._job.force_stop:
            self._machine.book.note(self._id, StopAsked())
        self._stop.set()

    async def kill(self, reason: str) -> None:
        """End a job that cannot go on; it has crashed, for this reason. For a job with a container."""
        self._reason = reason
        if self.container is not None:
            log.error("job killed", extra={"job": self._id, "reason": reason})
            await self.container.kill()

    def lost_volumes(self, outside: Sequence[Mounted]) -> list[str]:
        """Return where in the container a volume was whose file system has died. `outside` are the host's mounts."""
        targets = {os.path.normpath(binding.target) for binding in self._job.job.config.volumes}
        if self.container is None or not self.container.pid or not targets:
            return []
        try:
            inside = mounts.parse(Path(f"/proc/{self.container.pid}/mountinfo").read_text())
        except OSError:
            return []  # it has ended
        # Only those: a job that sees more of the host's mounts need not mind that one of them has ended.
        return [mount.place for mount in mounts.orphaned(inside, outside) if mount.place in targets]

    async def deregister(self) -> None:
        """Take the job's services out of discoverd now and for good."""
        if self._services is not None:
            await self._services.leave()

    # The procedure

    async def run(self) -> None:
        """Start the job and see it through to the end."""
        try:
            end = await self._start_and_watch()
        except _Stopped:
            end = Withdrawn()
        except Exception as error:  # The edge: a job that cannot be started fails, the daemon goes on.
            end = self._broken(error)
        await self._finish(end)

    async def reconnect(self) -> bool:
        """Find the container an earlier daemon has made and count what it uses as taken; tells whether there is one."""
        try:
            self.container = await self._machine.runtime.reconnect(self._directory)
        except (ContainerError, OSError, TimeoutError) as error:
            log.info("no container to take over", extra={"job": self._id, "reason": str(error)})
            return False
        except Exception:  # The edge: what one container has left behind must not keep the daemon from starting.
            log.exception("a container cannot be taken over", extra={"job": self._id})
            return False
        machine, spec = self._machine, self.container.spec
        self._loops = loops_of(spec.devices_created)
        machine.mounts.adopt(self._id, spec.rootfs.lower)
        if spec.rootfs.writable:
            self._scratch = Path(spec.rootfs.writable)
            machine.scratch.adopt(self._scratch)
        if spec.network is not None:
            trusted = environment.is_system_app(self._job.job)
            machine.network.restore(IPv4Address(spec.network.address), trusted=trusted)
        machine.certificates.adopt(self._job.job, self._addresses(spec.network), self._identity)
        return True

    async def take_over(self) -> None:
        """See a job through that an earlier daemon has begun; `reconnect` was called before."""
        if self._job.force_stop:
            self.stop()
        end: Happening
        if self.container is not None:
            try:
                end = await self._go_on(self.container)
            except Exception as error:  # The edge, as in `run`.
                end = self._broken(error)
        elif self._job.status == JobStatus.STARTING and self._job.pid is None:
            await self.run()  # it had not come to a container yet
            return
        elif self._job.force_stop:
            end = Ended(KILLED, signal.SIGKILL)  # as it was to end: by us, or with the machine
        else:
            end = Broken("the container is gone: the host was restarted, or somebody killed the container's init")
        await self._finish(end)

    async def clean_up_again(self) -> None:
        """Finish what an earlier daemon has begun."""
        await self._clean_up()

    def _broken(self, error: Exception) -> Broken:
        if not isinstance(error, EXPECTED):
            log.exception("job failed for a reason nobody expected", extra={"job": self._id})
        text = error.message if isinstance(error, ApiError) else str(error)
        return Broken(text or type(error).__name__)

    async def _start_and_watch(self) -> Happening:
        job = self._machine.book.note(
            self._id, AddressAssigned(environment.with_ports(self._job.job, await self._taken_ports()), "")
        ).job
        extras = profiles.extras(job.profiles)
        self._loops = loops_of(extras.devices)
        partition = partitions.choose(job.partition, self._machine.partitions)
        await self._unless_stopped(self._wait_for_the_host(job))
        async with self._machine.launching:
            made = await self._unless_stopped(self._prepare(job))
            steps.reach("prepared")
            job = self._job.job
            container = await self._machine.runtime.create(
                container_spec(job, partition, self._machine.facts, extras, made)
            )
            self.container = container
            steps.reach("created")
            await self._machine.book.apply(self._id, ContainerMade(container.pid))
            steps.reach("container-recorded")
            live = self._bring_to_life(container)
            steps.reach("output")
            await live.everybody_in()
            await container.resume()
            steps.reach("resumed")
            await self._machine.book.apply(self._id, Launched())
            steps.reach("running")
        return await self._watch(live)

    async def _go_on(self, container: Container) -> Happening:
        """Do what is left of the start, then watch."""
        live = self._bring_to_life(container)
        if container.state is State.CREATED:
            await live.everybody_in()
            await container.resume()
        if self._job.status == JobStatus.STARTING and container.state is not State.ENDED:
            await self._machine.book.apply(self._id, Launched())
        if live.job.config.tty:
            self.stop()  # its terminal went with the last daemon
        elif live.raw:
            live.drain_output()
        return await self._watch(live)

    # Preparing

    async def _taken_ports(self) -> set[int]:
        """Return the ports a job in the host's network cannot have: somebody's, or promised to another job."""
        if not self._job.job.config.host_network:
            return set()
        listening = await asyncio.to_thread(ports_in_use)
        # From here to the record nothing is waited for: two jobs must not be promised the same.
        jobs = self._machine.book.jobs.values()
        promised = {
            port.port for job in jobs if job.job.config.host_network and not job.status.down and job.job.id != self._id
            for port in job.job.config.ports
        }  # fmt: skip
        return promised | listening

    async def _wait_for_the_host(self, job: HostJob) -> None:
        """Wait for what the job needs of the node: its turn after a crash, the network, discoverd with its DNS."""
        steps.reach("waiting")
        delay = resurrection.delay_before(job)
        if delay:
            await self._machine.clock.sleep(delay)
        if not job.config.host_network:
            await self._machine.network.ready.wait()
        if "DISCOVERD" not in job.config.env:
            await self._machine.discovery.ready.wait()

    async def _prepare(self, job: HostJob) -> Prepared:
        """Make everything the container is built from. What was made is undone by `_clean_up`, also half of it."""
        machine = self._machine
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        steps.reach("directory")
        network = await self._address(job)
        lower, writable, volumes, identity = await _together(
            self._layers(job),
            self._write_layer(job),
            self._volumes(job),
            machine.certificates.issue(job, self._addresses(network), self._identity),
        )
        return Prepared(
            directory=self._directory,
            lower=lower,
            writable=writable,
            network=network,
            volumes=volumes,
            read_only=[volume for volume in volumes if machine.volumes.read_only(volume)],
            identity=self._identity if identity else None,
            resolv_conf=machine.network.resolv_conf(cluster=job.config.env.get("DISCOVERD") != "none"),
            discoverd=machine.discovery.for_job(job.config.env),
        )

    async def _address(self, job: HostJob) -> Network | None:
        if job.config.host_network:
            return None
        network = await self._machine.network.allocate(trusted=environment.is_system_app(job))
        steps.reach("allocated")
        addressed = environment.with_address(job, network.address)
        self._machine.book.note(self._id, AddressAssigned(addressed, network.address))
        steps.reach("addressed")
        return network

    async def _layers(self, job: HostJob) -> list[Path]:
        files = await _together(*(self._machine.layers.ensure(spec) for spec in job.mountspecs))
        steps.reach("layer-fetched")
        mounted = [
            await self._machine.mounts.acquire(spec.id, file, self._id)
            for spec, file in zip(job.mountspecs, files, strict=True)
        ]
        steps.reach("layer-mounted")
        return mounted

    async def _write_layer(self, job: HostJob) -> Path:
        self._scratch = await self._machine.scratch.take(scratch_bytes(job.resources))
        return self._scratch

    async def _volumes(self, job: HostJob) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        known = {info.id for info in self._machine.volumes.all()}
        for binding in job.config.volumes:
            if binding.volume not in known:
                raise VolumeError(f"job {self._id} required volume {binding.volume}, but that volume does not exist")
            paths[binding.volume] = await self._machine.volumes.mounted(binding.volume)
        steps.reach("volumes-mounted")
        return paths

    def _addresses(self, network: Network | None) -> list[str]:
        """Return what a job's certificate is valid for besides its names."""
        return [network.address] if network else [self._machine.facts.external_ip]

    @property
    def _directory(self) -> Path:
        return self._machine.directory / self._id

    @property
    def _identity(self) -> Path:
        return self._directory / "identity"

    # Running

    def _bring_to_life(self, container: Container) -> LiveJob:
        """Connect the output, then let those in who wait: they see the first byte."""
        machine, job = self._machine, self._job.job
        capture: Capture | None = None
        if not job.config.tty and not job.config.disable_log:
            source = Source(
                host_id=machine.facts.host_id,
                app_id=job.metadata.get(META_APP, ""),
                process_type=job.metadata.get(META_TYPE, ""),
                job_id=self._id,
            )
            capture = Capture(machine.logs, source, self._directory)
            capture.follow(container.stdout, container.stderr)
        live = LiveJob(job, container, capture, self.stop)
        machine.live.born(live)
        return live

    async def _watch(self, live: LiveJob) -> Happening:
        """Wait for the end, asked for or not, keeping the job's services registered meanwhile."""
        container = live.container
        patience = asyncio.get_running_loop().call_later(UNATTACHED_GRACE.total_seconds(), live.drain_if_unattached)
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._report_oom(live), name=f"oom of {self._id}")]
            if self._wants_services(live.job):
                address = self._service_address(container)
                self._services = JobServices(live.job, address, self._machine.discovery, self.kill)
                helpers.append(group.create_task(self._services.run(), name=f"services of {self._id}"))
            ended = group.create_task(container.wait(), name=f"end of {self._id}")
            asked = group.create_task(self._stop.wait(), name=f"stop of {self._id}")
            await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if self._services is not None:
                await self._services.leave()
            if not ended.done():
                await self._terminate(container, ended)
            result = await ended
            for helper in helpers:
                helper.cancel()
        patience.cancel()
        if live.capture is not None:
            if result.oom and not self._oom_reported:
                live.capture.note(OOM_NOTICE)  # it has died of that before we were told
            live.capture.silence()
        steps.reach("ended")
        if result.error is not None:
            return Broken(result.error)
        return Ended(result.code, result.signal, self._reason or self._out_of_memory(result, live.job))

    def _out_of_memory(self, result: Exit, job: HostJob) -> str | None:
        if not result.oom:
            return None
        return f"killed for lack of memory: it wanted more than its limit of {memory_bytes(job.resources) // MIB} MiB"

    async def _terminate(self, container: Container, ended: asyncio.Task[Any]) -> None:
        # That it was asked to stop: or its death would be a crash to the next daemon.
        await self._machine.book.written()
        steps.reach("stop-asked")
        try:
            await container.signal(signal.SIGTERM)
        except NotRunning:
            return
        steps.reach("terminated")
        await asyncio.wait((ended,), timeout=steps.patience(TERM_GRACE.total_seconds()))
        if not ended.done():
            log.info("job ignores SIGTERM, killing it", extra={"job": self._id})
            await container.kill()
            steps.reach("killed")

    def _wants_services(self, job: HostJob) -> bool:
        """System jobs register themselves, with the protocol they speak."""
        return not environment.is_system_app(job) and any(port.service for port in job.config.ports)

    def _service_address(self, container: Container) -> str:
        return container.spec.network.address if container.spec.network else self._machine.facts.external_ip

    async def _report_oom(self, live: LiveJob) -> None:
        async for total in live.container.oom_kills():
            log.warning("out of memory in a job", extra={"job": self._id, "total": total})
            if live.capture is not None:
                self._oom_reported = True
                live.capture.note(OOM_NOTICE)

    # Ending

    async def _finish(self, end: Happening) -> None:
        """Record the end (with the successor, if the host is to bring the job back), then clean up."""
        book = self._machine.book
        if isinstance(end, Broken):
            log.warning("job failed", extra={"job": self._id, "error": end.error})
            self._machine.live.failed(self._id, end.error)
        elif isinstance(end, Withdrawn):
            self._machine.live.failed(self._id, "the job was stopped")
        if resurrection.wanted(self._job) and not isinstance(end, Withdrawn):
            self.heir = resurrection.successor(self._job, self._machine.new_job_id(), self._machine.clock.now())
            await book.succeed(self._id, end, self.heir)
            log.info("job comes back", extra={"job": self._id, "as": self.heir.id})
        else:
            await book.apply(self._id, end)
        steps.reach("end-recorded")
        self._machine.departures.job_ended(self._job.job)
        await self._clean_up()

    async def _clean_up(self) -> None:
        """Give back all that the job had. A step that fails does not keep the others from being done."""
        machine, job = self._machine, self._job
        live = machine.live.get(self._id)
        if live is not None and live.capture is not None:
            live.capture.silence()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OUTPUT_GRACE.total_seconds()):
                    await live.capture.ended.wait()
        if live is not None:
            live.close_streams()
        steps.reach("output-read")
        if self.container is None or await self._destroyed(self.container):
            await self._step("address", self._release_address(job))
            steps.reach("address-released")
            await self._step("layers", machine.mounts.release(self._id))
            steps.reach("layers-released")
            for number in self._loops:
                await self._step("loop device", asyncio.to_thread(loop.take_back, number))
            await self._step("scratch", self._release_scratch())
            steps.reach("scratch-removed")
            for binding in job.job.config.volumes:
                if binding.delete_on_stop and self.heir is None:  # a successor goes on with them
                    await self._step("volume", machine.volumes.discard(binding.volume))
            steps.reach("volumes-removed")
            machine.certificates.forget(self._id)
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
            await machine.book.cleaned(self._id)
            steps.reach("cleaned")
        machine.live.gone(self._id)
        self.finished.set()

    async def _destroyed(self, container: Container) -> bool:
        for _ in range(DESTROY_TRIES):
            try:
                await container.destroy()
                return True
            except (ContainerError, OSError) as error:
                failure = error
                await self._machine.clock.sleep(DESTROY_PAUSE)
        log.error("container not destroyed, left to the next start", extra={"job": self._id, "error": str(failure)})
        return False

    async def _release_address(self, job: ActiveJob) -> None:
        if job.internal_ip:
            await self._machine.network.release(IPv4Address(job.internal_ip))

    async def _release_scratch(self) -> None:
        if self._scratch is not None:  # one of an earlier daemon was collected at the start of this one
            await self._machine.scratch.release(self._scratch)

    async def _step(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except EXPECTED as error:
            log.warning("cleaning up", extra={"job": self._id, "step": name, "error": str(error)})

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something that may take long, but give it up when the job is to stop. Raises `_Stopped`."""
        doing = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise _Stopped
        finally:
            stopping.cancel()
            if not doing.done():
                doing.cancel()
                await asyncio.gather(doing, return_exceptions=True)


def loops_of(devices: Sequence[Device]) -> list[int]:
    """Return the minor numbers of the loop devices among a container's devices."""
    return [one.minor for one in devices if (one.type, one.major) == ("b", loop.MAJOR) and one.minor >= 0]


async def _together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Do several things at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except BaseExceptionGroup as failures:
        first: BaseException = failures
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]
