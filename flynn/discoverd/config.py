"""Configuration of discoverd: the flags of spec/discoverd section 1.1, and where they come from in a container."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flynn.daemon import ConfigError
from flynn.discoverd.instances import join_host_port
from flynn.identity.identity import DEFAULT_DIRECTORY

PORT = 1111


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    data_dir: Path
    host: str  # the machine's address, advertised to everyone
    port: int
    peers: tuple[str, ...]  # `ip:port` of the members at first boot, own address included
    identity: Path
    admin_key_file: Path  # the host's key, for plain HTTP on loopback; missing = no such listener
    dns_address: tuple[str, int] | None
    recursors: tuple[str, ...]
    host_url: str  # flynn-host's API; empty = nobody to tell
    follow_bridge: bool  # serve DNS where the host's bridge is, once there is one
    job_id: str
    release: str  # of which this process is; says who takes over from whom
    raft_password: str = ""  # empty = see `raft_password()`

    @property
    def address(self) -> str:
        return join_host_port(self.host, self.port)


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Flags win over the environment. Raises ConfigError."""
    external_ip = environ.get("EXTERNAL_IP") or environ.get("FLYNN_HOST_IP") or ""
    in_container = bool(external_ip)
    parser = _Parser(prog="flynn-discoverd", allow_abbrev=False)
    flag = parser.add_argument
    flag("-data-dir", "--data-dir", default="/data" if in_container else None)
    flag("-host", "--host", default=external_ip or None)
    flag("-addr", "--addr", default=f":{environ.get('PORT_0') or PORT}")
    flag("-peers", "--peers", default=environ.get("DISCOVERD_PEERS", ""))
    flag("-dns-addr", "--dns-addr", default="")
    flag("-recursors", "--recursors", default="")
    flag("-notify", "--notify", default=f"https://{external_ip}:1113/host/discoverd" if in_container else "")
    flag("-wait-net-dns", "--wait-net-dns", nargs="?", const="true", default="true" if in_container else "false")
    given = parser.parse_args(arguments)
    for name in ("data_dir", "host"):
        if not getattr(given, name):
            raise ConfigError(f"-{name.replace('_', '-')} must be given")
    _, port = _host_port("-addr", given.addr)
    identity = Path(environ.get("FLYNN_IDENTITY") or DEFAULT_DIRECTORY)
    address = join_host_port(given.host, port)
    return Config(
        data_dir=Path(given.data_dir),
        host=given.host,
        port=port,
        peers=tuple(f"{_host_port('-peers', peer)[0]}:{port}" for peer in _items(given.peers)) or (address,),
        identity=identity,
        admin_key_file=Path(environ.get("FLYNN_HOST_KEY_FILE") or _first_file(identity / "host.key", HOST_KEY)),
        dns_address=_host_port("-dns-addr", given.dns_addr) if given.dns_addr else None,
        recursors=tuple(_items(given.recursors)),
        host_url=given.notify.removesuffix("/host/discoverd"),
        follow_bridge=given.wait_net_dns == "true",
        job_id=environ.get("FLYNN_JOB_ID", ""),
        release=environ.get("FLYNN_RELEASE_ID", ""),
        raft_password=environ.get("RAFT_KEY", ""),
    )


HOST_KEY = Path("/etc/flynn/host.key")


def raft_password(config: Config) -> str:
    """The secret that members of the cluster share: RAFT_KEY, else `raft.key` of the identity.

    A member that has neither is alone by necessity and makes one for itself, kept in its data directory.
    """
    if config.raft_password:
        return config.raft_password
    own = config.data_dir / "raft.key"
    for path in (config.identity / "raft.key", own):
        if path.is_file():
            return path.read_text().strip()
    if len(config.peers) > 1:
        raise ConfigError(f"{config.identity / 'raft.key'}: a cluster of several members needs a shared key")
    config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = secrets.token_urlsafe(32)
    own.touch(mode=0o600)
    own.write_text(password)
    return password


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _host_port(flag: str, text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError(f"{flag}: {text!r} is not host:port")
    return host, int(port)


def _first_file(*paths: Path) -> Path:
    return next((path for path in paths if path.is_file()), paths[-1])
