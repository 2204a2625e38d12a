"""Releases and their process types. See spec/controller sections 5.3 and 5.4."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Nanoseconds, Wire, always
from flynn.types.resources import Resources


class HealthCheck(Wire):
    type: str = ""  # tcp, http or https
    interval: Nanoseconds = Nanoseconds(0)  # 0 = 2 s
    threshold: int = 0  # 0 = 2
    kill_down: bool = False
    start_timeout: Nanoseconds = Nanoseconds(0)  # 0 = 10 s
    path: str = ""
    host: str = ""
    match: str = ""
    status: int = 0  # 0 = 200


class Service(Wire):
    """The discoverd service that flynn-host registers a port under."""

    name: str = ""
    create: bool = False
    check: HealthCheck | None = None


class Port(Wire):
    port: int = always(0)
    proto: str = always("")
    service: Service | None = None


class VolumeReq(Wire):
    path: str = ""
    delete_on_stop: bool = False
    size: int = 0  # bytes it may hold at most; 0 = what the host gives. Absent from the original's releases


class Mount(Wire):
    location: str = ""  # path in the container
    target: str = ""  # source on the host
    writeable: bool = False
    device: str = ""  # empty = bind mount, else a file system type
    data: str = ""
    flags: int = 0


class Device(Wire):
    type: int = always(0)  # code point of the letter: 99 = character, 98 = block
    path: str = always("")
    major: int = always(0)
    minor: int = always(0)  # -1 = any
    permissions: str = always("")
    file_mode: int = always(0)
    uid: int = always(0)
    gid: int = always(0)
    allow: bool = always(False)


class ProcessType(Wire):
    args: list[str] = []
    env: dict[str, str] = {}
    ports: list[Port] = []
    volumes: list[VolumeReq] = []
    omni: bool = False  # one job on every host
    host_network: bool = False
    host_pid_namespace: bool = False
    service: str = ""  # the job counts as up when this service lists it
    resurrect: bool = False  # the host restarts it by itself after a reboot
    resources: Resources = {}
    mounts: list[Mount] = []
    profiles: list[str] = []
    linux_capabilities: list[str] | None = None
    allowed_devices: list[Device] | None = None
    writeable_cgroups: bool = False
    cmd: list[str] = []  # deprecated, as are the next two: old releases carry them
    entrypoint: list[str] = []
    data: bool = False


class Release(Wire):
    id: str = ""
    app_id: str = ""
    artifacts: list[str] = []  # base image first, top layer last
    env: dict[str, str] = {}
    meta: dict[str, str] = {}
    processes: dict[str, ProcessType] = {}
    created_at: datetime | None = None
    artifact: str = ""  # legacy: artifacts[0]
