"""`database`: who is what in a database cluster, and keeping it from changing while somebody works on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click

from flynn.appliances.sirenia.client import ApplianceStatus, DatabaseClient
from flynn.host.cli.access import admin_key, directory_url, runs, state_dir
from flynn.host.cli.show import emit
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.codec import builtins
from flynn.types.errors import ApiError
from flynn.types.instance import Instance

ASK_SECONDS = 5.0
ORDER = ("primary", "sync", "async", "deposed", "unassigned", "unknown", "")

service = click.option("--service", default="postgres", show_default=True, help="The database's service.")


@click.group()
def database() -> None:
    """Show a database cluster, or freeze it: nobody takes over and no peer is added until it is unfrozen."""


@database.command()
@service
@click.option("--json", "as_json", is_flag=True)
@runs
async def status(service: str, as_json: bool) -> None:
    """Who is what, and whether it takes writes."""
    rows: list[tuple[str, ...]] = []
    found = []
    for instance in await _peers(service):
        async with _peer(instance) as client:
            try:
                answer: ApplianceStatus | None = await client.status()
                told = _row(answer)
            except ApiError as error:
                answer, told = None, ("", "", "", f"does not answer: {error.message}")
        rows.append((told[0], instance.meta.get("FLYNN_JOB_ID", ""), instance.addr, *told[1:]))
        found.append({"instance": builtins(instance), "status": builtins(answer)})
    rows.sort(key=lambda row: ORDER.index(row[0]))
    emit([("ROLE", "JOB", "ADDR", "WRITES", "POSITION", "WHY"), *rows], found, as_json)


def _row(status: ApplianceStatus | None) -> tuple[str, str, str, str]:
    assert status is not None  # it answered
    peer, database = status.peer, status.database
    frozen = peer.state.freeze if peer.state is not None else None
    why = "; ".join(
        text for text in (database.detail, peer.reason, f"frozen: {frozen.reason}" if frozen else "") if text
    )  # fmt: skip
    return str(peer.role), "yes" if database.read_write else "no", database.xlog, why


@database.command()
@service
@click.argument("reason", nargs=-1, required=True)
@runs
async def freeze(service: str, reason: tuple[str, ...]) -> None:
    """Keep everybody's role as it is, also when the primary is lost. REASON is shown to others."""
    text = " ".join(reason)
    async with _any_peer(service) as client:
        await client.freeze(text)
    click.echo(f"{service} is frozen: {text}")


@database.command()
@service
@runs
async def unfreeze(service: str) -> None:
    """Let the cluster change again; what was put off happens at once."""
    async with _any_peer(service) as client:
        await client.unfreeze()
    click.echo(f"{service} is not frozen any more")


async def _peers(service: str) -> list[Instance]:
    async with HttpClient(directory_url(), auth=KeyAuth(admin_key()), timeout=ASK_SECONDS) as http:
        found = await http.get(f"/services/{service}/instances", answer=list[Instance])
    if not found:
        raise click.ClickException(f"no peer of {service} is registered")
    return found


@asynccontextmanager
async def _peer(instance: Instance) -> AsyncIterator[DatabaseClient]:
    client = DatabaseClient(instance, Identity.load(state_dir() / "identity"), timeout=ASK_SECONDS)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def _any_peer(service: str) -> AsyncIterator[DatabaseClient]:
    """The first one that answers: any of them can write the state."""
    failures = []
    for instance in await _peers(service):
        async with _peer(instance) as client:
            try:
                await client.status()
            except ApiError as error:
                failures.append(f"{instance.addr}: {error.message}")
                continue
            yield client
            return
    raise click.ClickException("no peer answers: " + "; ".join(failures))
