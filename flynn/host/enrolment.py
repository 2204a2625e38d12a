"""How a machine becomes a host: the cluster's authority, the host's certificate, its admin key and `host.json`."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn

from flynn.aio.clock import Clock
from flynn.daemon import ConfigError
from flynn.host.certificates import renewal_due
from flynn.identity.authority import ClusterCA, expiry_of, write_private
from flynn.types.codec import encode_indented

log = logging.getLogger(__name__)

CHECK_EVERY = timedelta(hours=1)


def enrol(*, state_dir: Path, config_dir: Path, host_id: str, external_ip: str, args: Sequence[str]) -> None:
    """Make this machine the host of a new cluster. What exists already is kept, `host.json` excepted."""
    identity = state_dir / "identity"
    config_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (identity / "ca.key").exists():
        ClusterCA.create().save(identity)
    ClusterCA.load(identity).issue_host(host_id, [external_ip]).write(identity)
    (identity / "issued-to").write_text(subject(host_id, external_ip))
    key = config_dir / "host.key"
    if not key.exists():
        write_private(key, secrets.token_hex(32).encode() + b"\n")
    write_private(config_dir / "host.json", encode_indented({"args": list(args)}), mode=0o644)


def adopt_authority(state_dir: Path, ca: bytes, key: bytes) -> None:
    """Keep the authority of the cluster this machine joins. Raises `ConfigError` if it belongs to another cluster."""
    identity = state_dir / "identity"
    if (identity / "ca.pem").exists() and (identity / "ca.pem").read_bytes() != ca:
        raise ConfigError(f"{identity / 'ca.pem'}: this machine belongs to another cluster; remove {state_dir} first")
    identity.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(identity / "ca.key", key)
    write_private(identity / "ca.pem", ca, mode=0o644)


def authority(directory: Path) -> ClusterCA:
    """Return the cluster's authority. Raises `ConfigError`."""
    try:
        return ClusterCA.load(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--state-dir: {error}; has `flynn-host init` been run?") from error


def ensure_certificate(ca: ClusterCA, directory: Path, host_id: str, external_ip: str, now: datetime) -> None:
    """Have a host certificate that is for this id and address and not about to end."""
    try:
        fits = (directory / "issued-to").read_text() == subject(host_id, external_ip)
        begin, end = expiry_of((directory / "cert.pem").read_bytes())
        if fits and not renewal_due(begin, end, now):
            return
    except (OSError, ValueError):
        pass  # none, or an unreadable one
    ca.issue_host(host_id, [external_ip]).write(directory)
    (directory / "issued-to").write_text(subject(host_id, external_ip))


async def keep_certificate(ca: ClusterCA, directory: Path, host_id: str, external_ip: str, clock: Clock) -> NoReturn:
    """Renew the host's certificate in time, for ever; listeners and clients load the new one by themselves."""
    while True:
        await clock.sleep(CHECK_EVERY)
        try:
            await asyncio.to_thread(ensure_certificate, ca, directory, host_id, external_ip, clock.now())
        except OSError as error:
            log.error("the host's certificate could not be renewed", extra={"error": str(error)})


def subject(host_id: str, external_ip: str) -> str:
    return f"{host_id} {external_ip}\n"
