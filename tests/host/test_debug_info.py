"""collect-debug-info with a dead daemon: what is in the archive, and what must not be. The unit file."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from flynn import daemon
from flynn.host.cli.debug import clean, collect_debug_info
from flynn.host.cli.show import REDACTED
from flynn.host.state import SCHEMA
from flynn.types.codec import encode
from flynn.types.host import ActiveJob, ContainerConfig, HostJob

UNIT = Path(__file__).parents[2] / "systemd" / "flynn-host.service"


def test_the_archive_of_a_dead_daemon_has_jobs_and_logs_but_no_secrets(tmp_path: Path) -> None:
    state, config, logs = tmp_path / "state", tmp_path / "config", tmp_path / "log"
    for directory in (state, config, logs):
        directory.mkdir()
    (config / "host.key").write_text("hunter2hunter2")
    env = {"CONTROLLER_KEY": "s3cr3t-value", "PORT": "8080"}
    job = ActiveJob(job=HostJob(id="n1-a", config=ContainerConfig(env=env, args=["serve", "s3cr3t-value"])))
    connection = sqlite3.connect(state / "host.db")
    connection.executescript(SCHEMA)
    connection.execute("INSERT INTO jobs VALUES ('n1-a', ?, 0, 1, 1)", (encode(job),))
    connection.commit()
    connection.close()
    (logs / "app.log").write_text("started with s3cr3t-value and postgres://u:pw@db/x, admin hunter2hunter2\n")
    target = tmp_path / "out.tar.gz"
    arguments = ["--log-dir", str(logs), "--filename", str(target)]
    environment = {"FLYNN_STATE_DIR": str(state), "FLYNN_CONFIG_DIR": str(config)}
    result = CliRunner().invoke(collect_debug_info, arguments, env=environment)
    assert result.exit_code == 0, result.output
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        texts = {m.name: archive.extractfile(m).read().decode() for m in archive}  # type: ignore[union-attr]
    everything = "".join(texts.values())
    for secret in ("s3cr3t-value", "hunter2hunter2", "u:pw@"):
        assert secret not in everything
    assert "8080" in texts["flynn-host-debug/1-jobs.json"]
    assert "started with" in texts["flynn-host-debug/logs/app.log"]
    assert CliRunner().invoke(collect_debug_info, arguments, env=environment).exit_code == 1  # never overwrites


def test_a_private_key_is_taken_out_even_when_its_end_is_missing() -> None:
    assert clean("a -----BEGIN PRIVATE KEY-----\nMIIE", ()) == f"a {REDACTED}"


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setattr(daemon, "_notify_socket", str(tmp_path / "notify"))
        daemon.notify("READY=1")
        listener.settimeout(1)
        assert listener.recv(100) == b"READY=1"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/flynn-host", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
