"""`destroy-volumes`: taking a host's volumes and layers away, with the daemon stopped. spec/host.md section 17."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
import uuid
from pathlib import Path
from typing import NoReturn

import click

from flynn.host.cli.access import state_dir as default_state_dir

NOT_ROOT, LOCKED, NOT_WRITABLE, REMAIN = 1, 4, 5, 6


@click.command("destroy-volumes")
@click.option("--state-dir", type=click.Path(path_type=Path), default=None, help="Of the daemon. [/var/lib/flynn]")
@click.option("--zpool-name", default="flynn-default", show_default=True)
@click.option("--vol-provider", type=click.Choice(["zfs", "directory"]), default="zfs", show_default=True)
@click.option("--include-data", is_flag=True, help="Also the volumes with the data of jobs.")
@click.option("--keep-system-images", is_flag=True, help="Not the layers of images.")
@click.option("--forget", is_flag=True, help="Forget volumes whose storage is lost: the next start makes a new one.")
def destroy_volumes(
    state_dir: Path | None,
    zpool_name: str,
    vol_provider: str,
    include_data: bool,
    keep_system_images: bool,
    forget: bool,
) -> None:
    """Destroy what is on this host's disk of images and write layers, and of volumes if told to. The daemon is stopped.

    \b
    Exit status: 0 done, or there is nothing; 1 not root; 4 a daemon runs; 5 the state cannot be written;
    6 some volumes remain.
    """
    if os.geteuid() != 0:
        _fail(NOT_ROOT, "destroy-volumes must be run as root")
    directory = state_dir or default_state_dir()
    if not (directory / "host.db").exists():
        click.echo("already clean")
        return
    sys.exit(asyncio.run(_destroy(directory, zpool_name, vol_provider, include_data, keep_system_images, forget)))


def _fail(code: int, text: str) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)


async def _destroy(
    directory: Path, pool: str, provider: str, include_data: bool, keep_images: bool, forget: bool
) -> int:
    from flynn.host.state import StateInUse, StateStore, forget_volume

    try:
        store = StateStore(directory / "host.db")
    except StateInUse as error:
        _fail(LOCKED, str(error))
    except (OSError, sqlite3.Error) as error:
        _fail(NOT_WRITABLE, f"{directory / 'host.db'}: {error}")
    try:
        if not keep_images:
            for file in (directory / "layers").glob("*.squashfs"):
                file.unlink(missing_ok=True)
                click.echo(f"Deleted squashfs volume {file.stem}")
        _remove_write_layers(directory / "scratch")
        remain: dict[str, str] = {}
        if include_data and not forget:
            remain = await _destroy_data(store, directory, pool, provider)
        elif forget:
            for volume in store.volumes():
                await store.commit(forget_volume(volume.info.id), durable=True)
                click.echo(f"Forgot {volume.info.type} volume {volume.info.id}")
    except sqlite3.Error as error:
        _fail(NOT_WRITABLE, f"{directory / 'host.db'}: {error}")
    finally:
        store.close()
    for volume_id, why in remain.items():
        click.echo(f"could not delete volume {volume_id}: {why}", err=True)
    return REMAIN if remain else 0


async def _destroy_data(store: object, directory: Path, pool: str, provider: str) -> dict[str, str]:
    """Destroy all volumes, snapshots before what they are of; returns what remains, and why."""
    from flynn.aio.clock import SystemClock
    from flynn.host.state import StateStore
    from flynn.host.volumes.book import VolumeBook
    from flynn.host.volumes.directory import DirectoryProvider
    from flynn.host.volumes.provider import VolumeProvider
    from flynn.host.volumes.zfs import ZfsProvider
    from flynn.types.errors import ApiError

    assert isinstance(store, StateStore)
    volumes_dir = directory / "volumes"
    chosen: VolumeProvider = DirectoryProvider(volumes_dir / "directory")
    if provider == "zfs":
        chosen = ZfsProvider(pool, volumes_dir / "zfs")
    used = {
        binding.volume
        for kept in store.jobs()
        if not kept.job.status.down and kept.job.pid and Path(f"/proc/{kept.job.pid}").exists()
        for binding in kept.job.job.config.volumes
    }
    book = VolumeBook(store, {"default": chosen}, SystemClock(), lambda: used, lambda: str(uuid.uuid4()))
    await book.open()
    while True:
        remain: dict[str, str] = {}
        before = len(book.all())
        for info in sorted(book.all(), key=lambda info: info.created_at, reverse=True):
            try:
                await book.destroy(info.id)
                click.echo(f"Deleted {info.type} volume {info.id}")
            except ApiError as error:
                remain[info.id] = error.message
        if not remain or len(remain) == before:
            return remain


def _remove_write_layers(scratch: Path) -> None:
    """Those of jobs that are gone; a mounted one is of a job that runs."""
    if scratch.is_dir():
        for place in scratch.iterdir():
            if not os.path.ismount(place / "fs"):
                shutil.rmtree(place, ignore_errors=True)
