"""The files a PostgreSQL server is configured by. Pure: settings in, texts out. See spec/appliances section 6.1.

Who may connect: the daemon beside the server through a socket that only it can reach; the superuser over TLS; apps'
users over TLS or not, as the original allowed (the drivers of some languages never try TLS by themselves), always
with SCRAM, so that no password crosses the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOBODY = "nobody"
"""A standby that never comes: a primary that waits for it acknowledges no write."""

SUPERUSER = "flynn"
LOCAL_USER = "postgres"  # whom the daemon is on the private socket

EXTENSIONS = (
    "btree_gin,btree_gist,citext,cube,dblink,dict_int,earthdistance,fuzzystrmatch,hstore,intarray,isn,ltree,pg_prewarm,"
    "pg_stat_statements,pg_trgm,pgcrypto,pgrowlocks,pgstattuple,plpgsql,postgres_fdw,tablefunc,unaccent,uuid-ossp"
)
"""What apps' users may install by themselves; they are no superusers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    port: int
    socket_directory: Path
    certificate: Path | None = None  # None = no TLS (then the superuser cannot connect from elsewhere)
    key: Path | None = None
    peer_id: str = ""
    read_only: bool = False
    replicated: bool = False  # part of a cluster of several
    sync: str = ""  # whose confirmation every commit waits for; empty = nobody's, for a cluster of one
    primary_conninfo: str = ""  # whom a standby replicates from; empty = it only replays what it has
    extension_whitelist: bool = False  # whether the module that lets users create EXTENSIONS is installed


def postgresql_conf(settings: ServerSettings) -> str:
    values: dict[str, str | int] = {
        "listen_addresses": "*",
        "port": settings.port,
        "unix_socket_directories": str(settings.socket_directory),
        "unix_socket_permissions": "0700",
        "password_encryption": "scram-sha-256",
        # Memory: a node's platform has to fit into 1 GB, and the page cache does most of the work anyway.
        "max_connections": 400,
        "shared_buffers": "32MB",
        "work_mem": "4MB",
        "maintenance_work_mem": "32MB",
        "huge_pages": "off",
        "jit": "off",
        "max_parallel_workers": 2,
        "max_logical_replication_workers": 0,
        "autovacuum_max_workers": 2,
        # Durability: an acknowledged commit is on disk.
        "fsync": "on",
        "synchronous_commit": "on",
        "wal_level": "replica",
        "max_wal_senders": 15,
        "hot_standby": "on",
        "hot_standby_feedback": "on",
        "synchronous_standby_names": f'FIRST 1 ("{settings.sync}")' if settings.sync else "",
        "primary_conninfo": settings.primary_conninfo,
        "wal_log_hints": "on",  # a former primary can be rewound instead of copied anew
        # Commits hang while the sync is lost unnoticed, so a silent link is noticed within seconds.
        "wal_receiver_status_interval": "1s",
        "wal_receiver_timeout": "5s",
        "wal_sender_timeout": "6s",
        "wal_retrieve_retry_interval": "200ms",
        "max_standby_streaming_delay": "5s",  # queries on standbys must not delay a takeover for long
        "min_wal_size": "32MB",
        "max_wal_size": "256MB",
        # Connections of clients that vanished without a word are found within a minute.
        "tcp_keepalives_idle": 30,
        "tcp_keepalives_interval": 10,
        "tcp_keepalives_count": 3,
        "log_destination": "stderr",
        "logging_collector": "off",
        "log_line_prefix": f"{settings.peer_id} %m [%p] %q%u@%d ",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "timezone": "UTC",
        "datestyle": "iso, mdy",
        "client_encoding": "UTF8",
        "default_text_search_config": "pg_catalog.english",
    }
    if settings.replicated:
        values["wal_keep_size"] = "256MB"  # for standbys that were away; one that was away longer is copied anew
    if settings.certificate is not None and settings.key is not None:
        values["ssl"] = "on"
        values["ssl_cert_file"] = str(settings.certificate)
        values["ssl_key_file"] = str(settings.key)
        values["ssl_min_protocol_version"] = "TLSv1.2"
    if settings.read_only:
        values["default_transaction_read_only"] = "on"
    if settings.extension_whitelist:
        values["session_preload_libraries"] = "pgextwlist"
        values["extwlist.extensions"] = EXTENSIONS
    return "".join(f"{name} = {_quoted(value)}\n" for name, value in values.items())


def conninfo(**options: str | int) -> str:
    """How a server's program connects to another server. Nothing secret belongs here: others can read it."""
    return " ".join(
        "{}='{}'".format(name, str(value).replace("\\", "\\\\").replace("'", "\\'")) for name, value in options.items()
    )


def _quoted(value: str | int) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def pg_hba_conf() -> str:
    return f"""\
# type     database     user        address  method
local      all          all                  trust
hostssl    replication  {SUPERUSER}       all      scram-sha-256
hostssl    all          {SUPERUSER}       all      scram-sha-256
hostnossl  all          {SUPERUSER}       all      reject
host       all          {LOCAL_USER}    all      reject
host       all          all         all      scram-sha-256
"""
