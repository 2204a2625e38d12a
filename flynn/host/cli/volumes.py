"""`volume`: looking at volumes, making and destroying them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import click

from flynn.host.cli.access import all_hosts, host_named, runs
from flynn.host.cli.show import age, emit
from flynn.host.client import DEFAULT_PROVIDER, HostClient
from flynn.host.config import read_bytes
from flynn.types.errors import ApiError, Conflict, NotFound
from flynn.types.host import META_APP, ActiveJob
from flynn.types.volume import META_DELETE_ON_STOP, META_QUOTA, VolumeInfo, VolumeRequest


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
@click.option("--size", default="", help="What it may hold at most, as 10G.")
@click.argument("host_id", metavar="HOST")
@runs
async def create(provider: str, size: str, host_id: str) -> None:
    """Make an empty volume."""
    wanted = VolumeRequest(meta={META_QUOTA: str(read_bytes("--size", size))} if size else {})
    async with all_hosts() as hosts:
        info = await (await host_named(hosts, host_id)).create_volume(wanted, provider=provider)
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


@volume.command()
@click.option("--all", "everything", is_flag=True, help="Also data that an app's next job would find again.")
@runs
async def gc(everything: bool) -> None:
    """Destroy the volumes of all hosts that no job uses.

    Without --all, an app's data is kept, though no job may use it now: an app scaled to zero comes back to it.
    """
    failed = False
    async with all_hosts() as hosts:
        for host in hosts:
            try:
                unused, kept = garbage(await host.client.volumes(), (await host.client.jobs()).values(), everything)
                failed |= await _destroyed(host.client, unused)
            except ApiError as error:
                click.echo(f"could not collect the volumes of {host.id}: {error.message}", err=True)
                failed = True
                continue
            if kept:
                click.echo(f"kept {len(kept)} volumes on {host.id} with data of apps (--all destroys them)")
    if failed:
        raise click.ClickException("could not delete all volumes")


def garbage(
    volumes: Iterable[VolumeInfo], jobs: Iterable[ActiveJob], everything: bool
) -> tuple[list[VolumeInfo], list[VolumeInfo]]:
    """Return the volumes no job uses: those to be destroyed, the newest first, and those that an app may want back."""
    used = {binding.volume for job in jobs if not job.status.down for binding in job.job.config.volumes}
    unused, kept = [], []
    for info in volumes:
        wanted_back = bool(info.meta.get(META_APP)) and info.meta.get(META_DELETE_ON_STOP) != "true"
        if info.id in used:
            continue
        if wanted_back and not everything:
            kept.append(info)
        else:
            unused.append(info)
    return sorted(unused, key=lambda info: info.created_at, reverse=True), kept


async def _destroyed(host: HostClient, volumes: Sequence[VolumeInfo]) -> bool:
    """Destroy volumes, some of which others are snapshots or clones of; tells whether some could not be."""
    refusals: dict[str, ApiError] = {}
    waiting = list(volumes)
    while waiting:
        left = []
        for info in waiting:
            try:
                await host.destroy_volume(info.id)
                click.echo(f"Deleted {info.type} volume {info.id}")
            except NotFound:
                pass  # somebody else was quicker
            except Conflict as error:
                left.append(info)
                refusals[info.id] = error
            except ApiError as error:
                click.echo(f"could not delete volume {info.id}: {error.message}", err=True)
                return True
        if len(left) == len(waiting):
            for info in left:
                click.echo(f"could not delete volume {info.id}: {refusals[info.id].message}", err=True)
            return True
        waiting = left
    return False
