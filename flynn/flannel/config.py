"""Configuration of flannel: environment and flags of spec/flannel sections 2 and 3.1."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import NoReturn

from flynn.daemon import ConfigError
from flynn.flannel.document import DEFAULT_NETWORK, BackendType


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    external_ip: str  # the machine's address, by which the others reach it
    interface: str  # address or name of the interface the overlay runs over
    http_port: int
    host_url: str  # flynn-host's API
    host_id: str  # "" = this machine is known by its address alone
    job_id: str
    device: str  # name of the VXLAN device; "" = flannel.<VNI>
    subnet_file: Path
    network: IPv4Network  # this and what follows only matters to the first machine of a cluster
    backend: BackendType
    subnet_min: str
    subnet_max: str
    subnet_len: int  # 0 = default
    vni: int  # 0 = default
    port: int  # 0 = default


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Raises ConfigError."""
    external_ip = environ.get("EXTERNAL_IP") or environ.get("FLYNN_HOST_IP") or ""
    parser = _Parser(prog="flynn-flannel", allow_abbrev=False)

    def flag(name: str, default: str) -> None:
        variable = "FLANNELD_" + name.upper().replace("-", "_")
        parser.add_argument(f"-{name}", f"--{name}", default=environ.get(variable) or default)

    flag("iface", external_ip)
    flag("http-port", environ.get("PORT") or environ.get("PORT_0") or "5002")
    flag("notify-url", f"https://{external_ip}:1113/host/network")
    flag("subnet-file", "/run/flannel/subnet.env")
    flag("device", "")
    for name in ("subnet-min", "subnet-max"):
        flag(name, "")
    for name in ("subnet-len", "vni", "port"):
        flag(name, "0")
    given = parser.parse_args(arguments)
    if not external_ip:
        raise ConfigError("EXTERNAL_IP must be set")
    try:
        return Config(
            external_ip=external_ip,
            interface=given.iface,
            http_port=int(given.http_port),
            host_url=given.notify_url.removesuffix("/host/network"),
            host_id=environ.get("FLYNN_HOST_ID", ""),
            job_id=environ.get("FLYNN_JOB_ID", ""),
            device=given.device,
            subnet_file=Path(given.subnet_file),
            network=IPv4Network(environ["NETWORK"]) if environ.get("NETWORK") else DEFAULT_NETWORK,
            backend=BackendType((environ.get("BACKEND") or BackendType.VXLAN).lower()),
            subnet_min=given.subnet_min,
            subnet_max=given.subnet_max,
            subnet_len=int(given.subnet_len),
            vni=int(given.vni),
            port=int(given.port),
        )
    except ValueError as error:
        raise ConfigError(f"wrong value: {error}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)
