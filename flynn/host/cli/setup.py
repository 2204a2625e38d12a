"""`init` and `bootstrap`: from a machine to a cluster."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import click

from flynn.host.config import CONFIG_DIR, STATE_DIR, default_id, default_ip


@click.command()
@click.option("--id", "host_id", default="", help="Host id, without dashes. Default: the host name.")
@click.option("--external-ip", default="", help="Address this host is reached at. Default: of the default route.")
@click.option("--peer-ips", default="", help="Addresses of hosts of an existing cluster.")
@click.option("--state-dir", default=str(STATE_DIR), envvar="FLYNN_STATE_DIR", show_default=True)
@click.option("--config-dir", default=str(CONFIG_DIR), envvar="FLYNN_CONFIG_DIR", show_default=True)
def init(host_id: str, external_ip: str, peer_ips: str, state_dir: str, config_dir: str) -> None:
    """Make this machine the first host of a cluster: authority, certificate, admin key, host.json."""
    from flynn.host.enrolment import enrol

    host_id = host_id or default_id()
    if not host_id or "-" in host_id:
        raise click.UsageError(f"a host id has no dashes, got {host_id!r}")
    args = ["--id", host_id]
    if external_ip:
        args += ["--external-ip", external_ip]
    if peer_ips:
        args += ["--peer-ips", peer_ips]
    enrol(
        state_dir=Path(state_dir),
        config_dir=Path(config_dir),
        host_id=host_id,
        external_ip=external_ip or default_ip(),
        args=args,
    )
    click.echo(f"host {host_id} is set up: {config_dir}")


@click.command()
@click.option("-n", "--min-hosts", default=1, show_default=True)
@click.option("-t", "--timeout", default=120, show_default=True, help="Seconds to wait for the hosts.")
@click.option("--job-timeout", default=60, show_default=True, help="Seconds to wait for a job.")
@click.option("--images", default="build/images", show_default=True, help="Artifacts: a directory or one file.")
@click.option("--peer-ips", default="", help="Addresses of the hosts. Default: this machine.")
@click.option("--steps", default="", help="Only these, separated by commas.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--state-dir", default=str(STATE_DIR), envvar="FLYNN_STATE_DIR", show_default=True)
@click.option("--config-dir", default=str(CONFIG_DIR), envvar="FLYNN_CONFIG_DIR", show_default=True)
@click.argument("manifest", required=False)
def bootstrap(
    min_hosts: int,
    timeout: int,
    job_timeout: int,
    images: str,
    peer_ips: str,
    steps: str,
    as_json: bool,
    state_dir: str,
    config_dir: str,
    manifest: str | None,
) -> None:
    """Start the platform on hosts that are up. May be repeated: finished steps are skipped."""
    from flynn.bootstrap.main import Config
    from flynn.bootstrap.main import bootstrap as run

    text = b""
    if manifest:
        text = sys.stdin.buffer.read() if manifest == "-" else Path(manifest).read_bytes()
    config = Config(
        state_dir=Path(state_dir),
        config_dir=Path(config_dir),
        images=Path(images),
        manifest=text,
        min_hosts=min_hosts,
        peer_ips=tuple(ip for ip in peer_ips.split(",") if ip),
        host_timeout=timedelta(seconds=timeout),
        job_timeout=timedelta(seconds=job_timeout),
        steps=tuple(step for step in steps.split(",") if step),
        json=as_json,
    )
    sys.exit(run(config))
