"""The host API's vocabulary: jobs as flynn-host runs them, and its configuration. See spec/host section 4."""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum

from flynn.types.codec import Json, Nanoseconds, Wire, always, zero_time
from flynn.types.release import Device, Mount, Port
from flynn.types.resources import Resources
from flynn.types.volume import ProviderStatus

# Metadata keys of a job that the platform itself reads.
META_APP = "flynn-controller.app"
META_APP_NAME = "flynn-controller.app_name"
META_RELEASE = "flynn-controller.release"
META_TYPE = "flynn-controller.type"
META_FORMATION = "flynn-controller.formation"
META_SERVICE = "flynn-controller.service"  # names the certificate of a system job

TERM_HEADER = "Flynn-Scheduler-Term"  # with the requests of a scheduler: see flynn.host.jobs.fence


class JobStatus(IntEnum):
    STARTING = 0
    RUNNING = 1
    DONE = 2
    CRASHED = 3
    FAILED = 4

    @property
    def down(self) -> bool:
        return self >= JobStatus.DONE


class Mountspec(Wire):
    """One image layer of a job's root file system."""

    type: str = ""  # only squashfs
    id: str = ""
    url: str = ""
    size: int = 0  # bytes
    hashes: dict[str, str] = {}
    meta: dict[str, str] = {}


class VolumeBinding(Wire):
    target: str = always("")  # path in the container
    volume: str = always("")
    writeable: bool = always(False)
    delete_on_stop: bool = always(False)


class ContainerConfig(Wire):
    args: list[str] = []
    tty: bool = False
    stdin: bool = False
    data: bool = False
    env: dict[str, str] = {}
    mounts: list[Mount] = []
    volumes: list[VolumeBinding] = []
    ports: list[Port] = []
    working_dir: str = ""
    uid: int | None = None
    gid: int | None = None
    host_network: bool = False
    host_pid_namespace: bool = False
    disable_log: bool = False
    linux_capabilities: list[str] | None = None  # None = defaults, [] = none
    allowed_devices: list[Device] | None = None
    auto_created_devices: list[Device] | None = None
    writeable_cgroups: bool = False


class HostJob(Wire):
    """What a host is asked to run. `id` is `<host id>-<uuid>`."""

    id: str = ""
    mountspecs: list[Mountspec] = []
    metadata: dict[str, str] = {}
    resources: Resources = {}
    partition: str = ""
    config: ContainerConfig = always(ContainerConfig())
    resurrect: bool = False
    profiles: list[str] = []


class ActiveJob(Wire):
    """A job as its host knows it."""

    job: HostJob
    host_id: str = always("")
    internal_ip: str = ""
    pid: int | None = None
    force_stop: bool = False
    status: JobStatus = JobStatus.STARTING
    created_at: datetime = zero_time()
    started_at: datetime = zero_time()
    ended_at: datetime = zero_time()
    exit_status: int | None = None
    error: str | None = None


class JobStats(Wire):
    """What a job with a container uses at this moment."""

    memory_bytes: int = always(0)  # files it has read or written included, as far as the kernel keeps them for it
    memory_limit_bytes: int | None = always(None)
    cpu_seconds: float = always(0.0)  # since its start
    processes: int = always(0)
    oom_kills: int = always(0)


class JobEventKind(StrEnum):
    CREATE = "create"
    START = "start"
    STOP = "stop"
    ERROR = "error"
    CLEANUP = "cleanup"


class JobEvent(Wire):
    event: JobEventKind
    job_id: str
    job: ActiveJob | None = None


class DiscoverdConfig(Wire):
    job_id: str = always("")
    url: str = always("")  # comma-joined ip:port, without a scheme
    dns: str = always("")


class NetworkConfig(Wire):
    job_id: str = always("")
    subnet: str = always("")  # CIDR whose address is the bridge's
    mtu: int = always(0)
    resolvers: list[str] | None = always(None)
    network: str = ""  # the whole overlay, which is never masqueraded; absent from old posts


class HostUpdate(Wire):
    """How the last in-place update of a daemon went. Of ours: the original's status does not tell."""

    path: str = always("")
    at: datetime = zero_time()
    error: str = ""  # why the program before serves still


class DiskStatus(Wire):
    """The file system that carries a host's state, layers and write layers."""

    path: str = always("")
    size_bytes: int = always(0)
    free_bytes: int = always(0)
    reserve_bytes: int = always(0)  # what jobs may not have
    trouble: str = ""


class HostStatus(Wire):
    id: str = always("")
    tags: dict[str, str] = {}
    pid: int = always(0)
    url: str = always("")
    discoverd: DiscoverdConfig | None = None
    network: NetworkConfig | None = None
    version: str = always("")
    flags: list[str] | None = always(None)
    memory: int = 0  # bytes that the machine has; 0 from a daemon that does not say
    update: HostUpdate | None = None
    volumes: list[ProviderStatus] = []  # ours, as the next: old clients do not look
    disk: DiskStatus | None = None


class ResourceCheckPort(Wire):
    port: int = always(0)
    proto: str = always("tcp")


class ResourceCheck(Wire):
    ports: list[ResourceCheckPort] = always([])


class HostCommand(Wire):
    """An in-place update of the daemon: to the program at `path`. `pid` is set in the answer."""

    path: str = always("")
    args: list[str] = always([])
    pid: int = always(0)
    shutdown_delay: Nanoseconds | None = None


class AttachFlag(IntEnum):
    STDOUT = 1
    STDERR = 2
    STDIN = 4
    LOGS = 8
    STREAM = 16
    INIT_LOG = 32


class AttachReq(Wire):
    job_id: str = ""
    flags: int = 0
    height: int = 0
    width: int = 0


class ImagePullInfo(Wire):
    name: str = always("")
    type: str = always("")
    artifact: Json = always(None)
    layer: Json = always(None)
