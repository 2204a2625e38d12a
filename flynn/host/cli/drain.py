"""`drain`: empty this host before it is taken away or repaired."""

from __future__ import annotations

import asyncio

import click

from flynn.host.cli.access import directory_peers, discoverd_at, local_host, runs
from flynn.host.client import HostClient
from flynn.host.discovery import DISCOVERD_PORT
from flynn.types.errors import ApiError, NotFound
from flynn.types.host import META_APP_NAME

SECONDS = 90.0
NEEDED = frozenset({"discoverd", "flannel"})  # by the others while they stop; the scheduler ends them
BETWEEN = 0.5  # between two stops, so that replacements are up before the next one goes


@click.command()
@click.option("--undo", is_flag=True, help="Take jobs again.")
@runs
async def drain(undo: bool) -> None:
    """Move this host's jobs to the others: it gets no new ones, leaves the directory, and stops what it runs."""
    async with local_host() as host:
        if undo:
            await host.drain(draining=False)
            click.echo("takes jobs again")
            return
        status = await host.status()
        await _leave_the_directory(status.url.removeprefix("https://").rpartition(":")[0])
        # Now, and not before: the scheduler ends the discoverd of a host that is drained.
        await host.drain()
        await _stop_all(host)
    click.echo("drained")


async def _leave_the_directory(ip: str) -> None:
    try:
        peers, _ = await directory_peers()
    except ApiError:
        return  # no discoverd here
    address = f"{ip}:{DISCOVERD_PORT}"
    if address not in peers:
        return
    async with discoverd_at(address) as http:
        await http.call("POST", "/raft/demote", timeout=SECONDS)
    click.echo(f"left the directory; its members are {', '.join(peer for peer in peers if peer != address)}")


async def _stop_all(host: HostClient) -> None:
    """One after the other: each is replaced elsewhere."""
    for job_id, job in (await host.jobs(active=True)).items():
        app = job.job.metadata.get(META_APP_NAME, "")
        if app in NEEDED:
            continue
        try:
            await host.stop_job(job_id)
            click.echo(f"{job_id} ({app}) stopped")
        except NotFound:
            continue
        await asyncio.sleep(BETWEEN)
