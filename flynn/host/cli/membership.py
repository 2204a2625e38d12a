"""`promote` and `demote`: which hosts' discoverds are members, and so keep the directory."""

from __future__ import annotations

import click

from flynn.host.cli.access import directory_peers, discoverd_at, runs
from flynn.host.discovery import DISCOVERD_PORT
from flynn.types.errors import ApiError, Unreachable

SECONDS = 90.0  # a new member catches up with the whole log


@click.command()
@click.argument("address")
@runs
async def promote(address: str) -> None:
    """Make the discoverd at ADDRESS (of a host) a member of the directory."""
    target = peer_address(address)
    async with discoverd_at(target) as http:
        await http.call("POST", "/raft/promote", timeout=SECONDS)
    click.echo(f"Promoted peer {target}")


@click.command()
@click.option("-f", "--force", is_flag=True, help="Also when it does not answer: the others remove it.")
@click.argument("address")
@runs
async def demote(force: bool, address: str) -> None:
    """Make the discoverd at ADDRESS cease to be a member; it goes on as an observer."""
    target = peer_address(address)
    try:
        async with discoverd_at(target) as http:
            await http.call("POST", "/raft/demote", timeout=SECONDS)
    except Unreachable:
        if not force:
            raise
        await remove(target)
    click.echo(f"Demoted peer {target}")


async def remove(target: str) -> None:
    """Have the rest remove a member that is gone. Raises ClickException if nobody could."""
    peers, _ = await directory_peers()
    failures = []
    for peer in peers:
        if peer == target:
            continue
        try:
            async with discoverd_at(peer) as http:
                return await http.delete(f"/raft/peers/{target}")
        except ApiError as error:
            failures.append(f"{peer}: {error}")
    raise click.ClickException("no member could remove it: " + "; ".join(failures or ["there is no other"]))


def peer_address(text: str) -> str:
    """`10.0.0.1`, `10.0.0.1:1111` or the URL of either."""
    bare = text.removeprefix("http://").removeprefix("https://").rstrip("/")
    return bare if ":" in bare else f"{bare}:{DISCOVERD_PORT}"
