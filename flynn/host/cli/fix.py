"""`fix`: bring the platform back from the records of its jobs, after what the hosts do by themselves was not enough.

In the order in which the platform's parts need each other: discoverd and flannel on every host, then, if nobody runs
them anywhere, the database, the controller and its scheduler. Everything else is the scheduler's.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import click

from flynn.host.cli.access import Found, all_hosts, directory_peers, host_at, runs
from flynn.host.jobs import resurrection
from flynn.types.codec import replace
from flynn.types.errors import ApiError
from flynn.types.host import META_APP_NAME, META_TYPE, ActiveJob, HostJob

EVERYWHERE = (("discoverd", "app"), ("flannel", "app"))
SOMEWHERE = (("postgres", "postgres"), ("controller", "web"), ("controller", "worker"), ("controller", "scheduler"))
POLL_SECONDS = 0.5

Records = Mapping[str, Mapping[str, ActiveJob]]  # the jobs of each host, by their ids


@dataclass(frozen=True, slots=True)
class Start:
    """A job to be started from the record of an earlier one."""

    host: str
    app: str
    process_type: str
    record: ActiveJob


def missing(records: Records, process: tuple[str, str], *, everywhere: bool) -> list[Start]:
    """Return what has to be started of a process: a job on every host, or all that once ran if none is left.

    A host without a record of its own gets a copy of another one's.
    """
    ours = {host: [job for job in jobs.values() if _is(job, process)] for host, jobs in records.items()}
    if not everywhere and any(not job.status.down for jobs in ours.values() for job in jobs):
        return []
    newest = max((job for jobs in ours.values() for job in jobs), key=lambda job: job.created_at, default=None)
    starts = []
    for host, jobs in ours.items():
        if any(not job.status.down for job in jobs):
            continue
        own = max(jobs, key=lambda job: job.created_at, default=newest if everywhere else None)
        if own is not None:
            starts.append(Start(host, *process, own))
    return starts


def again(start: Start, new_id: str, now: datetime) -> HostJob:
    """Return the job that takes the place of the recorded one, on its own or on another host."""
    job = resurrection.successor(start.record, new_id, now)
    metadata = {key: value for key, value in job.metadata.items() if key not in resurrection.META_EXTRA}
    return replace(job, metadata=metadata)


def _is(job: ActiveJob, process: tuple[str, str]) -> bool:
    meta = job.job.metadata
    return (meta.get(META_APP_NAME), meta.get(META_TYPE)) == process


@click.command()
@click.option("-n", "--min-hosts", required=True, type=int, help="How many hosts the cluster has.")
@click.option("--peer-ips", default="", help="Their addresses, while discoverd cannot tell them.")
@click.option("--timeout", default=60, show_default=True, help="Seconds to wait for discoverd.")
@runs
async def fix(min_hosts: int, peer_ips: str, timeout: int) -> None:
    """Start what the cluster cannot do without, from the records of what ran: discoverd and flannel on every host,
    then database, controller and scheduler if none is left. What runs is not touched, so it may be repeated.
    """
    async with AsyncExitStack() as stack:
        hosts = {host.id: host for host in await stack.enter_async_context(all_hosts())}
        for ip in filter(None, peer_ips.split(",")):
            try:
                host = await stack.enter_async_context(host_at(ip.strip()))
            except ApiError as error:
                raise click.ClickException(f"the host at {ip} does not answer: {error.message}") from error
            hosts.setdefault(host.id, host)
        if len(hosts) < min_hosts:
            raise click.ClickException(
                f"expected {min_hosts} hosts, found {len(hosts)} ({', '.join(sorted(hosts))}); name all with --peer-ips"
            )
        for process in EVERYWHERE:
            await _start_missing(list(hosts.values()), process, everywhere=True)
        await _wait_for_discoverd(timeout)
        for process in SOMEWHERE:
            await _start_missing(list(hosts.values()), process, everywhere=False)
    click.echo("the rest is up to the scheduler; see: flynn-host ps, flynn-host log ID")


async def _start_missing(hosts: Sequence[Found], process: tuple[str, str], *, everywhere: bool) -> None:
    name = " ".join(dict.fromkeys(process)) if process[1] != "app" else process[0]
    records = {host.id: await host.client.jobs() for host in hosts}
    if not any(_is(job, process) for jobs in records.values() for job in jobs.values()):
        raise click.ClickException(f"no record of a {name} job on any host; see: flynn-host bootstrap")
    starts = missing(records, process, everywhere=everywhere)
    if not starts:
        click.echo(f"{name} runs")
    clients = {host.id: host.client for host in hosts}
    for start in starts:
        job = again(start, f"{start.host}-{uuid.uuid4()}", datetime.now(UTC))
        await clients[start.host].add_job(job)
        click.echo(f"{name} started on {start.host} as {job.id}")


async def _wait_for_discoverd(seconds: int) -> None:
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    peers, leader = await directory_peers()
                    if leader:
                        click.echo(f"discoverd answers, its leader is {leader}, its members are {', '.join(peers)}")
                        return
                except ApiError:
                    pass
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise click.ClickException(
            f"discoverd has no leader after {seconds} s; see: flynn-host ps -a, flynn-host log --init ID"
        ) from None
