"""`volume`: looking at volumes, making and destroying them."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from flynn.host.cli.access import all_hosts, host_named, runs
from flynn.host.cli.show import age, emit
from flynn.host.client import DEFAULT_PROVIDER
from flynn.types.errors import ApiError
from flynn.types.volume import VolumeInfo, VolumeRequest


@click.group()
def volume() -> None:
    """Look at volumes, make and destroy them."""


@volume.command("list")
@click.option("--json", "as_json", is_flag=True)
@runs
async def list_volumes(as_json: bool) -> None:
    """List the volumes of all hosts, oldest first."""
    found: list[tuple[str, VolumeInfo]] = []
    async with all_hosts() as hosts:
        for host in hosts:
            found += [(host.id, info) for info in await host.client.volumes()]
    found.sort(key=lambda item: item[1].created_at)
    now = datetime.now(UTC)
    rows = [("ID", "TYPE", "HOST", "CREATED", "META")]
    for host_id, info in found:
        meta = " ".join(f"{key}={value}" for key, value in sorted(info.meta.items()))
        rows.append((info.id, info.type, host_id, age(info.created_at, now), meta))
    emit(rows, [info for _, info in found], as_json)


@volume.command()
@click.option("--provider", default=DEFAULT_PROVIDER, show_default=True)
@click.argument("host_id", metavar="HOST")
@runs
async def create(provider: str, host_id: str) -> None:
    """Make an empty volume."""
    async with all_hosts() as hosts:
        info = await (await host_named(hosts, host_id)).create_volume(VolumeRequest(), provider=provider)
    click.echo(f"created volume {info.id} on {host_id}")


@volume.command()
@click.argument("volume_ids", metavar="ID...", nargs=-1, required=True)
@runs
async def delete(volume_ids: tuple[str, ...]) -> None:
    """Destroy volumes and their data."""
    failed = False
    async with all_hosts() as hosts:
        places = {info.id: host.client for host in hosts for info in await host.client.volumes()}
        for volume_id in volume_ids:
            if volume_id not in places:
                click.echo(f"could not delete volume {volume_id}: volume not found", err=True)
                failed = True
                continue
            try:
                await places[volume_id].destroy_volume(volume_id)
                click.echo(f"{volume_id} deleted")
            except ApiError as error:
                click.echo(f"could not delete volume {volume_id}: {error}", err=True)
                failed = True
    if failed:
        raise click.ClickException("could not delete all volumes")
