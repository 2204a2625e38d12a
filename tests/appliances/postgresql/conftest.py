"""Real PostgreSQL servers of the machine, with certificates of a CA made for the tests."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flynn.identity import Identity
from flynn.identity.authority import ClusterCA

BIN = Path("/usr/lib/postgresql/15/bin")


@dataclass(frozen=True, slots=True)
class Site:
    """One database's place: its directories, port and certificates."""

    root: Path
    ca: ClusterCA
    port: int

    def identity(self, app: str, process: str = "web", service: str = "") -> Identity:
        directory = self.root / f"identity-{app}-{process}"
        if not directory.exists():
            self.ca.issue_job(app, process, service, ["127.0.0.1"]).write(directory)
        return Identity.load(directory)

    def environment(self) -> dict[str, str]:
        self.identity("postgres", "postgres", "postgres")
        return {
            "FLYNN_IDENTITY": str(self.root / "identity-postgres-postgres"),
            "FLYNN_APP_NAME": "postgres",
            "FLYNN_JOB_ID": "host-1",
            "EXTERNAL_IP": "127.0.0.1",
            "PORT": str(self.port),
            "PGPASSWORD": "s3cret",
            "SINGLETON": "true",
            "DATA_DIR": str(self.root / "data"),
            "RUN_DIR": str(self.root / "run"),
            "PG_BIN": str(BIN),
        }


def free_port() -> int:
    """A port whose successor is free as well: the management API listens there.

    Below those that outgoing connections get: whoever starts again later finds it free.
    """
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("0.0.0.0", port))
                second.bind(("0.0.0.0", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture
def site() -> Iterator[Site]:
    if not (BIN / "postgres").exists():
        pytest.skip("PostgreSQL 15 is not installed")
    # Not pytest's own directory, which the server's user could not enter.
    root = Path(tempfile.mkdtemp(prefix="flynn-pg-", dir="/tmp"))
    root.chmod(0o755)
    (root / "data").mkdir()
    try:
        yield Site(root, ClusterCA.create(), free_port())
    finally:
        shutil.rmtree(root, ignore_errors=True)
