"""`collect-debug-info`: what somebody else needs to see what is wrong, in one local archive, without secrets.

It reads files and runs commands, so that it works while the daemon is dead. Nothing is sent anywhere.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import click

from flynn.host.cli.access import admin_key, state_dir
from flynn.host.cli.show import REDACTED
from flynn.host.config import LOG_DIR
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.codec import Json, decode, encode_indented, replace
from flynn.types.errors import ApiError
from flynn.types.host import ActiveJob
from flynn.types.instance import Instance

LOG_TAIL_BYTES = 4 << 20  # of each file
COMMAND_SECONDS = 10
ASK_SECONDS = 3.0
SHORTEST_SECRET = 6  # shorter values would turn up in words and numbers that are none
_TELLING = re.compile(r"key|token|pass|secret|url|cert|auth|credential|dsn", re.IGNORECASE)
_IN_TEXT = (
    (re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"), REDACTED),
    (re.compile(r"(\w://)[^/\s@:]*:[^/\s@]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"(?i)(authorization:\s*\w+\s+)\S+"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)([?&](?:signature|key|token|password)=)[^&\s\"']+"), rf"\1{REDACTED}"),
)
COMMANDS = (
    "uname -a", "uptime", "free -m", "df -h", "ps -eo pid,ppid,stat,rss,etime,comm", "ip addr", "ip route",
    "nft list ruleset", "mount", "zpool status", "zfs list", "ss -lntup",
    "systemctl status flynn-host --no-pager --lines 0", "journalctl -u flynn-host --no-pager -n 5000",
)  # fmt: skip


def secrets_of(environments: Iterable[Mapping[str, str]]) -> list[str]:
    """The values that must not appear anywhere, longest first so that none is cut by another."""
    found = {
        value for env in environments for name, value in env.items()
        if _TELLING.search(name) and len(value) >= SHORTEST_SECRET
    }  # fmt: skip
    return sorted(found, key=len, reverse=True)


def without_secrets(job: ActiveJob) -> ActiveJob:
    """The record with the values of telling variables replaced."""
    env = {name: REDACTED if _TELLING.search(name) else value for name, value in job.job.config.env.items()}
    return replace(job, job=replace(job.job, config=replace(job.job.config, env=env)))


def clean(text: str, secrets: Iterable[str]) -> str:
    """Take known secrets, private keys and passwords in addresses out of `text`."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for pattern, substitute in _IN_TEXT:
        text = pattern.sub(substitute, text)
    return text


def recorded_jobs(state: Path) -> list[ActiveJob]:
    """All jobs in host.db, which is opened read-only. Raises `sqlite3.Error`."""
    with closing(sqlite3.connect(f"file:{state / 'host.db'}?mode=ro", uri=True)) as reader:
        return [decode(record, ActiveJob) for (record,) in reader.execute("SELECT record FROM jobs ORDER BY added")]


@click.command("collect-debug-info")
@click.option("--log-dir", default=str(LOG_DIR), show_default=True, type=click.Path(path_type=Path))
@click.option("--filename", default="", help="Default: /tmp/flynn-host-debug-<time>.tar.gz")
@click.option("--tarball", is_flag=True, hidden=True, help="As it is always.", expose_value=False)
def collect_debug_info(log_dir: Path, filename: str) -> None:
    """Write an archive with logs, jobs and the machine's condition, without secrets. The daemon need not run."""
    path = Path(filename or f"/tmp/flynn-host-debug-{datetime.now(UTC):%Y%m%d-%H%M%S}.tar.gz")
    files: dict[str, str] = {}
    jobs: list[ActiveJob] = []
    try:
        jobs = recorded_jobs(state_dir())
        files["1-jobs.json"] = encode_indented([without_secrets(job) for job in jobs]).decode()
    except (sqlite3.Error, ApiError) as error:
        files["1-jobs.json"] = f"not readable: {error}\n"
    secrets = secrets_of(job.job.config.env for job in jobs)
    try:
        secrets.append(admin_key())
    except click.ClickException:
        pass
    secrets = [secret for secret in secrets if secret]
    files["0-debug-output.log"] = "\n".join(_output(command) for command in COMMANDS)
    for log in sorted(log_dir.rglob("*")) if log_dir.is_dir() else []:
        if log.is_file() and not log.is_symlink():
            files[f"logs/{log.relative_to(log_dir)}"] = _tail(log)
    files |= asyncio.run(_states())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, text in files.items():
            body = clean(text, secrets).encode()
            entry = tarfile.TarInfo(f"flynn-host-debug/{name}")
            entry.size, entry.mode, entry.mtime = len(body), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(body))
    click.echo(str(path))


def _output(command: str) -> str:
    try:
        done = subprocess.run(
            command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_SECONDS, check=False
        )
        return f"$ {command}\n{done.stdout.decode(errors='replace')}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"$ {command}\n{error}\n"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            if size > LOG_TAIL_BYTES:
                file.readline()  # a line cut in two could hide half a secret
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"not readable: {error}\n"


async def _states() -> dict[str, str]:
    """What scheduler and databases say of themselves, as far as they can be reached."""
    found: dict[str, str] = {}
    for service, offset, path in (("controller-scheduler", 0, "/debug/state"), ("postgres", 1, "/status")):
        name = "scheduler-state" if offset == 0 else f"{service}-sirenia-state"
        try:
            async with HttpClient("http://127.0.0.1:1111", auth=KeyAuth(admin_key()), timeout=ASK_SECONDS) as http:
                instances = await http.get(f"/services/{service}/instances", answer=list[Instance])
            identity = Identity.load(state_dir() / "identity")
            for number, instance in enumerate(instances):
                host, _, port = instance.addr.rpartition(":")
                url = f"https://{host}:{int(port) + offset}"
                async with HttpClient(url, tls=identity, timeout=ASK_SECONDS) as http:
                    state = await http.get(path, answer=Json)
                found[f"{name}-{number}.json"] = encode_indented(state).decode()
        except (ApiError, OSError, ValueError, click.ClickException) as error:
            found[f"{name}.error"] = f"{error}\n"
    return found
