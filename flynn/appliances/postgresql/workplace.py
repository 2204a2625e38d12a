"""Where the server works: its directories, configuration files and certificates, as its user can read them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flynn.appliances.postgresql.configuration import (
    SUPERUSER,
    ServerSettings,
    conninfo,
    pg_hba_conf,
    postgresql_conf,
)
from flynn.appliances.postgresql.postmaster import Installation
from flynn.appliances.sirenia.database import DatabaseError
from flynn.identity import Identity
from flynn.types.instance import Instance

COPIES = (("key.pem", "server.key"), ("cert.pem", "server.crt"), ("ca.pem", "ca.crt"))
"""The key first: the server reads both at one moment, when it is told to, after both are in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    data: Path  # the volume; the cluster is in its directory `db`
    run: Path  # sockets, certificate copies and the password file, reachable for us and the server only
    port: int
    password: str  # of the superuser
    peer_id: str
    installation: Installation
    id_key: str = "POSTGRES_ID"  # which metadata of an instance carries the logical identity

    @property
    def passfile(self) -> Path:
        return self.run / "pgpass"


@dataclass(frozen=True, slots=True)
class Mode:
    """What the server's configuration says."""

    standby: bool
    upstream: Instance | None  # of a standby; None = it only replays what it has
    sync: str  # whose confirmation commits wait for
    read_only: bool
    replicated: bool


@dataclass(frozen=True, slots=True)
class Workplace:
    config: ServerConfig
    identity: Identity | None  # without one there is no TLS

    def prepare(self) -> None:
        """Raises DatabaseError."""
        config = self.config
        try:
            os.chmod(config.data, 0o755)  # the server's user has to get through to its own directory
            config.run.mkdir(mode=0o700, parents=True, exist_ok=True)
            config.installation.own(config.run)
            self.copy_certificate()
        except OSError as error:
            raise DatabaseError(f"cannot prepare the server: {error}") from error

    def admit(self, data: Path) -> None:
        """Write who may connect. Raises OSError."""
        self._write(data / "pg_hba.conf", pg_hba_conf())

    def configure(self, data: Path, mode: Mode) -> None:
        """Write how the server is to be, which it reads at a start or a reload. Raises OSError."""
        self._write(data / "postgresql.conf", postgresql_conf(self._settings(mode)))

    def _settings(self, mode: Mode) -> ServerSettings:
        config = self.config
        return ServerSettings(
            port=config.port,
            socket_directory=config.run,
            certificate=config.run / "server.crt" if self.identity else None,
            key=config.run / "server.key" if self.identity else None,
            peer_id=config.peer_id,
            read_only=mode.read_only,
            replicated=mode.replicated,
            sync=mode.sync,
            primary_conninfo=self.source(mode.upstream) if mode.upstream is not None else "",
            extension_whitelist=config.installation.extension_whitelist,
        )

    def source(self, upstream: Instance, suffix: str = "") -> str:
        """How to connect to another server.

        Only replication itself goes by our name: to the primary, whatever comes in under the sync's name confirms.
        """
        return conninfo(
            host=upstream.host,
            port=upstream.port,
            user=SUPERUSER,
            dbname="postgres",
            passfile=str(self.config.passfile),
            application_name=self.config.peer_id + suffix,
            sslmode="verify-full",
            sslrootcert=str(self.config.run / "ca.crt"),
            connect_timeout=3,
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=3,
        )

    def copy_certificate(self) -> bool:
        """Copy the identity to where the server's user can read it; returns whether it is a new one."""
        if self.identity is None:
            return False
        new = not self.config.passfile.exists()
        if new:
            self._write(self.config.passfile, f"*:*:*:{SUPERUSER}:{_escaped(self.config.password)}\n")
        for source, target in COPIES:
            content = (self.identity.directory / source).read_text()
            path = self.config.run / target
            if not path.exists() or path.read_text() != content:
                self._write(path, content)
                new = True
        return new

    def _write(self, path: Path, content: str) -> None:
        beside = path.with_name(f".{path.name}.new")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.config.installation.own(beside)
        beside.rename(path)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:")
