"""`status`, `list`, `tags`, `resource-check`, `log-sink`: looking at hosts."""

from __future__ import annotations

import click

from flynn.host.cli.access import all_hosts, directory_peers, host_named, local_host, runs
from flynn.host.cli.show import emit
from flynn.host.discovery import DISCOVERD_PORT
from flynn.host.jobs.room import mib
from flynn.types.codec import Json, encode
from flynn.types.errors import ApiError, Conflict
from flynn.types.host import ResourceCheckPort

PLATFORM_PORTS = (1111, 1113, 53, 5002, 80, 443)


@click.command()
@click.option("--json", "as_json", is_flag=True)
@runs
async def status(as_json: bool) -> None:
    """Show this machine's host."""
    async with local_host() as host:
        found = await host.status()
        jobs = await host.jobs(active=True)
    rows = [
        ("ID", found.id),
        ("URL", found.url),
        ("Version", found.version),
        ("PID", str(found.pid)),
        ("Tags", ",".join(f"{key}={value}" for key, value in sorted(found.tags.items()))),
        ("Network", found.network.subnet if found.network else "not configured"),
        ("Discoverd", found.discoverd.url if found.discoverd else "not configured"),
        ("DNS", found.discoverd.dns if found.discoverd else "not configured"),
        ("Jobs", str(len(jobs))),
        *((("Disk", found.disk.trouble or f"{mib(found.disk.free_bytes)} free"),) if found.disk else ()),
        *(("Volumes", f"{store.kind}: {store.trouble or 'available'}") for store in found.volumes),
    ]
    emit(rows, found, as_json)


@click.command("list")
@click.option("--json", "as_json", is_flag=True)
@runs
async def list_hosts(as_json: bool) -> None:
    """List the hosts of the cluster."""
    async with all_hosts() as hosts:
        roles = await _roles([host.address for host in hosts])
        rows = [("ID", "ADDR", "RAFT STATUS")] + [(host.id, host.address, roles[host.address]) for host in hosts]
        found = [{"id": host.id, "addr": host.address, "raft_status": roles[host.address]} for host in hosts]
        emit(rows, found, as_json)


async def _roles(addresses: list[str]) -> dict[str, str]:
    """What the discoverd of each host is to the directory; empty while nobody can tell."""
    try:
        peers, leader = await directory_peers()
    except ApiError:
        return dict.fromkeys(addresses, "")

    def role(address: str) -> str:
        discoverd = f"{address.rpartition(':')[0]}:{DISCOVERD_PORT}"
        if discoverd not in peers:
            return "proxy"
        return "peer (leader)" if discoverd == leader else "peer"

    return {address: role(address) for address in addresses}


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def tags(ctx: click.Context, as_json: bool) -> None:
    """Show or change the tags of hosts, by which the scheduler places jobs."""
    if ctx.invoked_subcommand is None:
        _list_tags(as_json)


@runs
async def _list_tags(as_json: bool) -> None:
    rows, found = [("HOST", "TAGS")], dict[str, dict[str, str]]()
    async with all_hosts() as hosts:
        for host in hosts:
            found[host.id] = (await host.client.status()).tags
            rows.append((host.id, " ".join(f"{key}={value}" for key, value in sorted(found[host.id].items()))))
    emit(rows, found, as_json)


@tags.command("set")
@click.argument("host_id", metavar="HOST")
@click.argument("pairs", metavar="KEY=VALUE...", nargs=-1, required=True)
@runs
async def set_tags(host_id: str, pairs: tuple[str, ...]) -> None:
    """Set tags; a bare key means true."""
    wanted = {key: value if equals else "true" for key, equals, value in (pair.partition("=") for pair in pairs)}
    async with all_hosts() as hosts:
        await (await host_named(hosts, host_id)).set_tags(wanted)


@tags.command("del")
@click.argument("host_id", metavar="HOST")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@runs
async def delete_tags(host_id: str, keys: tuple[str, ...]) -> None:
    """Delete tags."""
    async with all_hosts() as hosts:
        await (await host_named(hosts, host_id)).set_tags(dict.fromkeys(keys, ""))


@click.command("resource-check")
@click.option("--json", "as_json", is_flag=True)
@click.argument("ports", type=int, nargs=-1)
@runs
async def resource_check(as_json: bool, ports: tuple[int, ...]) -> None:
    """Check that the platform's ports (or those given) are free on this machine. Exit status 1 if they are not."""
    conflicts: list[dict[str, Json]] = []
    async with local_host() as host:
        try:
            await host.resource_check([ResourceCheckPort(port=port) for port in ports or PLATFORM_PORTS])
        except Conflict as error:
            conflicts = error.detail["ports"]
    if as_json:
        click.echo(encode({"ports": conflicts}))
    elif not conflicts:
        click.echo("all ports are free")
    if conflicts:
        taken = ", ".join(f"{port['proto']}:{port['port']}" for port in conflicts)
        raise click.ClickException(f"Conflicting resources found: {taken}; `ss -lntup` shows who uses them")


@click.group("log-sink")
def log_sink() -> None:
    """Look at where logs are sent."""


@log_sink.command("list")
@click.argument("host_id", metavar="HOST")
@click.option("--json", "as_json", is_flag=True)
@runs
async def list_sinks(host_id: str, as_json: bool) -> None:
    """List the sinks of a host."""
    async with all_hosts() as hosts:
        sinks = await (await host_named(hosts, host_id)).sinks()
    rows = [("ID", "KIND", "CONFIG", "HOST MANAGED")]
    for sink in sinks:
        rows.append((sink.id, sink.kind, encode(sink.config).decode(), str(sink.host_managed).lower()))
    emit(rows, sinks, as_json)
