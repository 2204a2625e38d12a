"""Configuration of the daemon: one value, made from the command line and `host.json`. spec/host.md section 2."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from flynn.daemon import ConfigError
from flynn.host.jobs.partitions import DEFAULT_PARTITIONS, BadPartitions, parse
from flynn.types.codec import decode
from flynn.types.errors import ApiError

STATE_DIR = Path("/var/lib/flynn")
CONFIG_DIR = Path("/etc/flynn")
LOG_DIR = Path("/var/log/flynn")
HTTP_PORT = 1113
BIN_DIR = Path("/usr/local/bin")
VERSIONS = "versions"  # below the first installation, those that updates have brought


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the daemon is told. Several may run on one machine if all paths and names differ."""

    id: str  # without dashes: job ids are `<host id>-<uuid>`
    external_ip: IPv4Address
    state_dir: Path = STATE_DIR  # host.db, identity, jobs, layers, scratch, volumes
    config_dir: Path = CONFIG_DIR  # host.key, host.json
    log_dir: Path = LOG_DIR  # one file per app
    http_port: int = HTTP_PORT
    listen_ip: str = ""  # of the TLS listener; empty = the external address
    bridge_name: str = "flynnbr0"
    zpool_name: str = "flynn-default"
    volume_provider: str = "zfs"  # or directory
    disk_reserve: int | None = None  # bytes of the state's disk that jobs may not have; None = 5 %, at most 2 GiB
    volume_quota: int = 0  # bytes; the limit of volumes whose creator names none; 0 = none
    cgroup_root: str = "flynn"
    partitions: Mapping[str, int] = field(default_factory=lambda: parse(DEFAULT_PARTITIONS))
    tags: Mapping[str, str] = field(default_factory=dict)
    max_job_concurrency: int = 4  # jobs launched at a time
    peer_ips: tuple[str, ...] = ()  # hosts whose discoverd is asked as long as there is none here
    force: bool = False  # stop all jobs found at the start
    bin_dir: Path = BIN_DIR  # links to the program, which an update moves
    program_dir: Path = Path("/opt/flynn") / VERSIONS  # the programs of later releases
    flags: tuple[str, ...] = ()  # the command line, for the status

    @property
    def identity_dir(self) -> Path:
        return self.state_dir / "identity"

    @property
    def key_file(self) -> Path:
        return self.config_dir / "host.key"


def configured(options: Mapping[str, Any], flags: Sequence[str]) -> Config:
    """Make a configuration from parsed options. Raises `ConfigError` naming the flag that is wrong."""
    host_id = options["id"] or default_id()
    if not host_id or "-" in host_id or "/" in host_id:
        raise ConfigError(f"--id: a host id has no dashes, got {host_id!r}")
    try:
        external_ip = IPv4Address(options["external_ip"] or default_ip())
    except ValueError as error:
        raise ConfigError(f"--external-ip: {error}") from error
    try:
        partitions = parse(options["partitions"])
    except BadPartitions as error:
        raise ConfigError(f"--partitions: {error}") from error
    return Config(
        id=host_id,
        external_ip=external_ip,
        state_dir=Path(options["state_dir"]).absolute(),
        config_dir=Path(options["config_dir"]).absolute(),
        log_dir=Path(options["log_dir"]).absolute(),
        http_port=options["http_port"],
        listen_ip=options["listen_ip"],
        bridge_name=options["bridge_name"],
        zpool_name=options["zpool_name"],
        volume_provider=options["vol_provider"],
        disk_reserve=read_bytes("--disk-reserve", options["disk_reserve"]) if options["disk_reserve"] else None,
        volume_quota=read_bytes("--volume-quota", options["volume_quota"]),
        cgroup_root=options["cgroup_root"],
        partitions=partitions,
        tags=parse_tags(options["tags"]),
        max_job_concurrency=max(1, options["max_job_concurrency"]),
        peer_ips=tuple(ip.strip() for ip in options["peer_ips"].split(",") if ip.strip()),
        force=options["force"],
        bin_dir=Path(options["bin_dir"]).absolute(),
        program_dir=Path(options["program_dir"] or default_program_dir(Path(sys.prefix))).absolute(),
        flags=tuple(flags),
    )


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def read_bytes(flag: str, text: str) -> int:
    """Read `0`, `500M` or `10G` (binary units). Raises `ConfigError`."""
    number, unit = text.rstrip("KMGTkmgt"), text.lstrip("0123456789").upper()
    if not number.isdigit() or unit not in UNITS:
        raise ConfigError(f"{flag}: want bytes such as 500M or 10G, got {text!r}")
    return int(number) * UNITS[unit]


def parse_tags(text: str) -> dict[str, str]:
    """Read `k=v,k2`: a bare key is true, only the first `=` splits, empty items are skipped."""
    tags: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key:
            tags[key] = value if equals else "true"
    return tags


def default_id() -> str:
    return socket.gethostname().replace("-", "")


def default_program_dir(prefix: Path) -> Path:
    """Return where releases are installed beside the Python environment that runs, which may be one of them."""
    return prefix.parent if prefix.parent.name == VERSIONS else prefix / VERSIONS


def default_ip() -> str:
    """Return the address this machine would use to reach the world, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise ConfigError("--external-ip: must be given, this machine has no default route") from error
        return str(probe.getsockname()[0])


@dataclass(frozen=True, slots=True)
class HostFile:
    """`host.json`: arguments and environment of the daemon that the command line does not carry."""

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def read_host_file(config_dir: Path, environ: Mapping[str, str] = os.environ) -> HostFile:
    """Read `host.json`, or the file `FLYNN_HOST_CONFIG` names (which must then exist). Raises `ConfigError`."""
    named = environ.get("FLYNN_HOST_CONFIG")
    path = Path(named) if named else config_dir / "host.json"
    try:
        document = decode(path.read_bytes(), dict[str, Any])
    except FileNotFoundError:
        if named:
            raise ConfigError(f"FLYNN_HOST_CONFIG: {path} does not exist") from None
        return HostFile()
    except (OSError, ApiError) as error:
        raise ConfigError(f"{path}: {error}") from error
    args, env = document.get("args") or [], document.get("env") or {}
    if not isinstance(args, list) or not isinstance(env, dict):
        raise ConfigError(f"{path}: args must be a list and env an object")
    return HostFile(tuple(str(arg) for arg in args), {str(key): str(value) for key, value in env.items()})


def shown(flags: Sequence[str]) -> str:
    """Format a command line for people."""
    return shlex.join(flags)
