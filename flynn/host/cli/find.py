"""`discover` and `cli-add-command`: where things are, and how a client gets there."""

from __future__ import annotations

import base64
import hashlib
import os
import ssl
from collections.abc import Iterable

import click

from flynn.discoverd.client import Discoverd
from flynn.host.cli.access import admin_key, all_hosts, directory_url, runs
from flynn.host.cli.show import emit
from flynn.types.codec import Json, builtins
from flynn.types.errors import ApiError
from flynn.types.host import META_APP_NAME, META_TYPE, ActiveJob

INSTALL_HINT = "# install the client with `pip install flynn`, then tell it of this cluster:"


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("services", metavar="SERVICE...", nargs=-1, required=True)
@runs
async def discover(as_json: bool, services: tuple[str, ...]) -> None:
    """Show the instances of services, as discoverd knows them."""
    rows = [("SERVICE", "ID", "ADDR")]
    found: list[Json] = []
    async with Discoverd.connect(directory_url(), key=admin_key()) as directory:
        for name in services:
            instances, leader = await directory.instances(name), await directory.leader(name)
            meta = await directory.get_meta(name)
            rows += [(name, instance.id, instance.addr) for instance in instances]
            found.append(
                {
                    "Name": name,
                    "Leader": builtins(leader),
                    "Instances": builtins(instances),
                    "Meta": None if meta is None else {"Data": meta.data, "index": meta.index},
                }
            )
    emit(rows, found, as_json)


@click.command("cli-add-command")
@runs
async def cli_add_command() -> None:
    """Print the command that makes a `flynn` client use this cluster. It contains the controller's key."""
    jobs: list[ActiveJob] = []
    async with all_hosts() as hosts:
        for host in hosts:
            try:
                jobs += (await host.client.jobs(active=True)).values()
            except ApiError as error:
                click.echo(f"could not list the jobs of {host.id}: {error.message}", err=True)
    click.echo(add_command(jobs))


def add_command(jobs: Iterable[ActiveJob]) -> str:
    """Return what `cli-add-command` prints. Raises `ClickException` if the jobs do not say enough."""
    controller = _newest_env(jobs, "controller", "web")
    router = _newest_env(jobs, "router", "app")
    key, domain = controller.get("AUTH_KEY", "").partition(",")[0], controller.get("DEFAULT_ROUTE_DOMAIN", "")
    certificate = router.get("TLSCERT", "")
    for what, value in (("controller's AUTH_KEY", key), ("controller's DEFAULT_ROUTE_DOMAIN", domain)):
        if not value:
            raise click.ClickException(f"the {what} is not set; see: flynn-host ps, flynn-host inspect ID")
    pin = f"-p {_pin(certificate)} " if certificate else ""  # without one the client trusts the public authorities
    return f"{INSTALL_HINT}\n\nflynn cluster add {pin}default {domain} {key}"


def _newest_env(jobs: Iterable[ActiveJob], app: str, process_type: str) -> dict[str, str]:
    ours = [
        job for job in jobs
        if (job.job.metadata.get(META_APP_NAME), job.job.metadata.get(META_TYPE)) == (app, process_type)
        and not job.status.down
    ]  # fmt: skip
    if not ours:
        raise click.ClickException(f"no {app} {process_type} job runs; see: flynn-host ps -a, flynn-host fix")
    return max(ours, key=lambda job: job.created_at).job.config.env


def _pin(certificate: str) -> str:
    try:
        der = ssl.PEM_cert_to_DER_cert(certificate[: certificate.index("-----END CERTIFICATE-----") + 25] + os.linesep)
    except ValueError as error:
        raise click.ClickException(f"the router's TLSCERT cannot be read: {error}") from error
    return base64.b64encode(hashlib.sha256(der).digest()).decode()
