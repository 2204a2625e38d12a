"""The configuration of the controller's two daemons, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo

from flynn.daemon import ConfigError
from flynn.identity import Identity

NAME_SEED_BYTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the daemons are told from outside."""

    port: int = 3000  # PORT: where to listen, on all addresses
    keys: tuple[str, ...] = ()  # AUTH_KEY: comma separated accepted keys; none means that everything is refused
    ca_cert: str = ""  # CA_CERT: PEM text served at /ca-cert
    domain: str = ""  # DEFAULT_ROUTE_DOMAIN: domain of the apps' default routes; empty = they get none
    name_seed: bytes = bytes(NAME_SEED_BYTES)  # NAME_SEED: hex; makes this cluster's app names its own
    database: str  # connection string, from FLYNN_POSTGRES, PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSSLMODE


def configuration(environ: Mapping[str, str], identity: Identity) -> Config:
    """Read the environment. Raises `ConfigError` naming the variable."""
    return Config(
        port=_port(environ.get("PORT") or "3000"),
        keys=tuple(filter(None, (key.strip() for key in environ.get("AUTH_KEY", "").split(",")))),
        ca_cert=environ.get("CA_CERT", ""),
        domain=environ.get("DEFAULT_ROUTE_DOMAIN", ""),
        name_seed=_seed(environ.get("NAME_SEED", "")),
        database=_conninfo(environ, identity),
    )


def _port(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) <= 65535:
        raise ConfigError(f"PORT is not a port: {text!r}")
    return int(text)


def _seed(text: str) -> bytes:
    try:
        seed = bytes.fromhex(text)
    except ValueError:
        raise ConfigError("NAME_SEED is not hexadecimal") from None
    if seed and len(seed) != NAME_SEED_BYTES:
        raise ConfigError(f"NAME_SEED must have {NAME_SEED_BYTES} bytes, not {len(seed)}")
    return seed or bytes(NAME_SEED_BYTES)


def _conninfo(environ: Mapping[str, str], identity: Identity) -> str:
    """Return where the database is: the leader of its discoverd service, trusted by the cluster's authority."""
    for name in ("PGUSER", "PGDATABASE"):
        if not environ.get(name):
            raise ConfigError(f"{name} is not set")
    service = environ.get("FLYNN_POSTGRES") or "postgres"
    host = environ.get("PGHOST") or f"leader.{service}.discoverd"
    mode = environ.get("PGSSLMODE") or "verify-full"
    return make_conninfo(
        host=host,
        port=environ.get("PGPORT") or "5432",
        user=environ["PGUSER"],
        password=environ.get("PGPASSWORD", ""),
        dbname=environ["PGDATABASE"],
        sslmode=mode,
        sslrootcert=str(identity.ca_path) if mode.startswith("verify") else None,
        sslcert=_existing(identity.directory / "cert.pem"),
        sslkey=_existing(identity.directory / "key.pem"),
        application_name="controller",
    )


def _existing(path: Path) -> str | None:
    return str(path) if path.exists() else None
