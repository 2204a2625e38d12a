"""The object graph of `flynn-host daemon`, in the order of its start; leaving undoes it in reverse.

Leaving never ends a job: containers go on by themselves, and the next daemon takes them over.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet, supervisor
from flynn.daemon import ConfigError
from flynn.host import steps
from flynn.host.api import HostApi
from flynn.host.attaching import Attachments
from flynn.host.certificates import JobCertificates
from flynn.host.config import Config
from flynn.host.discovery import Discovery
from flynn.host.disk import StateDisk, drop_ballast_if_full
from flynn.host.enrolment import authority, ensure_certificate, keep_certificate
from flynn.host.jobs.admission import volumes_in_use
from flynn.host.jobs.book import JobBook
from flynn.host.jobs.environment import HostFacts
from flynn.host.joining import Joining, JoinTokens
from flynn.host.layers import LayerStore
from flynn.host.live import LiveJobs
from flynn.host.logs.files import LogDirectory
from flynn.host.logs.sinks import Sinks
from flynn.host.networking import NodeNetwork
from flynn.host.node import Node
from flynn.host.releases import Releases
from flynn.host.runner import JobRunner
from flynn.host.runtime.layers import LayerMounts
from flynn.host.runtime.runtime import Runtime
from flynn.host.runtime.scratch import ScratchPool
from flynn.host.services.departures import Departures
from flynn.host.state import StateInUse, StateStore
from flynn.host.supervision import Machine
from flynn.host.update import Update
from flynn.host.volumes.book import VolumeBook
from flynn.host.volumes.directory import DirectoryProvider
from flynn.host.volumes.provider import VolumeProvider
from flynn.host.volumes.zfs import ZfsProvider
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.types.errors import NotFound
from flynn.types.host import META_APP, HostJob

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DISCOVERD_ZONE = ".discoverd"
LINGER = 0.15  # seconds for a connection accepted last to send its request


@asynccontextmanager
async def running(config: Config, update: Update) -> AsyncIterator[None]:
    """Be the host: restore what ran, serve the API, follow the cluster."""
    clock = SystemClock()
    key = _admin_key(config)
    certificate_authority = authority(config.identity_dir)
    ensure_certificate(certificate_authority, config.identity_dir, config.id, str(config.external_ip), clock.now())
    identity = Identity.load(config.identity_dir)
    if drop_ballast_if_full(config.state_dir):
        log.error("the disk is full, the ballast was given up", extra={"path": str(config.state_dir)})
    try:
        store = StateStore(config.state_dir / "host.db")
    except StateInUse as error:
        raise ConfigError(f"--state-dir: {error}") from error
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        logs = LogDirectory(config.log_dir)
        stack.callback(logs.close)
        discovery = Discovery(identity)
        stack.push_async_callback(discovery.close)
        network = NodeNetwork(bridge_name=config.bridge_name, external_ip=config.external_ip)
        runtime = Runtime(
            state_dir=config.state_dir, cgroup_root=config.cgroup_root, partitions=dict(config.partitions)
        )
        await stack.enter_async_context(runtime)
        scratch = await stack.enter_async_context(ScratchPool(config.state_dir / "scratch"))
        tasks = await stack.enter_async_context(TaskSet())

        book = JobBook(store, clock, config.id)
        volumes = VolumeBook(
            store,
            {"default": _volume_provider(config)},
            clock,
            lambda: volumes_in_use(book.jobs.values()),
            _new_id,
            default_quota=config.volume_quota,
        )
        await volumes.open()
        certificates = JobCertificates(certificate_authority, clock, config.key_file.read_bytes())
        live = LiveJobs()
        mounts = LayerMounts(config.state_dir / "layers")
        releases = Releases(config.state_dir, config.config_dir, config.program_dir)
        layers = LayerStore(
            config.state_dir / "layers",
            _Sources(discovery, identity).client,
            tasks,
            released=releases,
            mounted=mounts.mounted,
        )
        disk = StateDisk(
            config.state_dir,
            config.disk_reserve,
            layers,
            logs,
            in_use=lambda: {
                spec.id for job in book.jobs.values() if not job.status.down for spec in job.job.mountspecs
            },
            apps=lambda: {job.job.metadata.get(META_APP, "") for job in book.jobs.values()},
        )
        machine = Machine(
            facts=HostFacts(host_id=config.id, external_ip=str(config.external_ip), listen_ip=config.listen_ip),
            partitions=config.partitions,
            directory=config.state_dir / "jobs",
            runtime=runtime,
            layers=layers,
            mounts=mounts,
            scratch=scratch,
            disk=disk,
            volumes=volumes,
            network=network,
            discovery=discovery,
            departures=Departures(discovery, tasks),
            certificates=certificates,
            logs=logs,
            live=live,
            book=book,
            launching=asyncio.Semaphore(config.max_job_concurrency),
            clock=clock,
            new_job_id=lambda: f"{config.id}-{_new_id()}",
        )
        runner = JobRunner(machine, tasks)
        node = Node(config, store, network, discovery, volumes, identity, BOOT_ID.read_text().strip(), update, disk)
        sinks = Sinks(
            host_id=config.id,
            store=store,
            logs=logs,
            discovery=discovery,
            identity=identity,
            find=lambda job_id: _job_of(book, job_id),
            tasks=tasks,
        )
        attachments = Attachments(runner.find, live, logs)

        living = await runner.restore()
        await node.restore(living)
        await discovery.begin_with(config.peer_ips)
        runner.go_on(node.slots)
        if config.force and not update.inherited:  # an update leaves jobs alone, whatever the flags say
            for job_id in living:
                tasks.start(f"stop {job_id}", runner.stop(job_id))
        sinks.restore()
        stack.callback(runner.leave)

        spawn = await stack.enter_async_context(supervisor())
        spawn("announce the host", node.announcement.run())
        spawn("follow hosts", node.follow_hosts())
        spawn("follow logaggregators", sinks.follow_aggregators())
        spawn("look after the disk", disk.watch(store))
        spawn("look after volumes", volumes.tend(runner.end_bereaved))
        spawn("renew certificates", certificates.renew())
        own = keep_certificate(certificate_authority, config.identity_dir, config.id, str(config.external_ip), clock)
        spawn("renew the host's certificate", own)
        spawn(
            "collect layers",
            layers.collect(lambda: {spec.id for job in book.jobs.values() for spec in job.job.mountspecs}),
        )

        joining = Joining(
            JoinTokens(store, clock),
            clock,
            ca=certificate_authority.pem,
            ca_key=certificate_authority.key_pem,
            own_address=str(config.external_ip),
            http_port=config.http_port,
        )
        host_api = HostApi(
            update=lambda command: update.ask(command, config.flags, clock),
            node=node,
            book=book,
            runner=runner,
            attachments=attachments,
            volumes=volumes,
            sinks=sinks,
            joining=joining,
            releases=releases,
        )
        api = host_api.api()
        steps.reach("restored")
        outside = config.listen_ip or str(config.external_ip)
        inside = _listener(update, "loopback", LOOPBACK, config.http_port)
        await stack.enter_async_context(listen(api, LOOPBACK, config.http_port, key=key, sock=inside, linger=LINGER))
        if outside != LOOPBACK:
            # Who wants to join has no certificate yet; every other endpoint asks for one by itself.
            tls_socket = _listener(update, "outside", outside, config.http_port)
            listener = listen(
                api, outside, config.http_port, tls=identity, require_client=False, sock=tls_socket, linger=LINGER
            )
            await stack.enter_async_context(listener)
        stack.callback(host_api.hang_up)
        update.ready(config.bin_dir)
        log.info("host up", extra={"id": config.id, "address": outside, "jobs": len(living)})
        yield


def _listener(update: Update, name: str, host: str, port: int) -> socket.socket:
    try:
        return update.listeners.open(name, host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


def _admin_key(config: Config) -> str:
    try:
        key = config.key_file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--config-dir: {error}; has `flynn-host init` been run?") from error
    if not key:
        raise ConfigError(f"--config-dir: {config.key_file} is empty")
    return key


def _volume_provider(config: Config) -> VolumeProvider:
    if config.volume_provider == "directory":
        return DirectoryProvider(config.state_dir / "volumes" / "directory")
    return ZfsProvider(config.zpool_name, config.state_dir / "volumes" / "zfs")


def _new_id() -> str:
    return str(uuid.uuid4())


def _job_of(book: JobBook, job_id: str) -> HostJob | None:
    job = book.jobs.get(job_id)
    return job.job if job else None


class _Sources:
    """Clients of the places layers come from. `x.discoverd` is looked up in discoverd: the host's own resolver is not
    the cluster's."""

    def __init__(self, discovery: Discovery, identity: Identity) -> None:
        self._discovery, self._identity = discovery, identity

    async def client(self, base_url: str) -> HttpClient:
        url = urlsplit(base_url)
        name = url.hostname or ""
        if not name.endswith(DISCOVERD_ZONE):
            return HttpClient(base_url)
        await self._discovery.connected.wait()
        service = name.removesuffix(DISCOVERD_ZONE).removeprefix("leader.")
        if name.startswith("leader."):
            leader = await self._discovery.registry.leader(service)
            instances = [leader] if leader is not None else []
        else:
            instances = await self._discovery.registry.instances(service)
        if not instances:
            raise NotFound(f"the service {service} has no instances")
        tls = self._identity if url.scheme == "https" else None
        return HttpClient(base_url, tls=tls, connect_to=random.choice(instances).addr)
