"""`ps`, `inspect`, `stop`, `signal`: looking at jobs and ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from flynn.host.cli.access import all_hosts, find_job, host_named, host_of, runs
from flynn.host.cli.show import REDACTED, age, emit
from flynn.host.template import Template, TemplateError
from flynn.types.codec import ZERO_TIME
from flynn.types.errors import ApiError
from flynn.types.host import META_APP_NAME, META_TYPE, ActiveJob

LAST_TO_STOP = "discoverd"  # the others deregister with it


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Show jobs that are down, too.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("-f", "--format", "template", default="", help='For each job: Go\'s templates, {{metadata "key"}}.')
@click.option("--json", "as_json", is_flag=True)
@runs
async def ps(everything: bool, quiet: bool, template: str, as_json: bool) -> None:
    """List jobs of all hosts, newest first."""
    shape = _template(template) if template else None
    jobs: list[ActiveJob] = []
    async with all_hosts() as hosts:
        for host in hosts:
            try:
                jobs += (await host.client.jobs(active=not everything)).values()
            except ApiError as error:
                click.echo(f"could not list the jobs of {host.id}: {error}", err=True)
    jobs.sort(key=lambda job: job.created_at, reverse=True)
    if (quiet or shape is not None) and not as_json:
        for job in jobs:
            click.echo(job.job.id if shape is None else render(shape, job))
        return
    now = datetime.now(UTC)
    rows = [("ID", "STATE", "CREATED", "CONTROLLER APP", "CONTROLLER TYPE", "ERROR")]
    for job in jobs:
        meta = job.job.metadata
        row = (
            job.job.id,
            job.status.name.lower(),
            age(job.created_at, now),
            meta.get(META_APP_NAME, ""),
            meta.get(META_TYPE, ""),
            job.error or "",
        )
        rows.append(row)
    emit(rows, jobs, as_json)


def _template(text: str) -> Template:
    try:
        return Template(text, ("metadata",))
    except TemplateError as error:
        raise click.UsageError(f"-f: {error}") from error


def render(template: Template, job: ActiveJob) -> str:
    """Apply a template with the function `metadata "key"` to a job."""
    try:
        return template.render(job, {"metadata": lambda key: job.job.metadata.get(key, "")})
    except TemplateError as error:
        raise click.ClickException(f"-f: {error}") from error


@click.command()
@click.option("--omit-env", is_flag=True)
@click.option("--redact-env", default="", help="Names, separated by commas.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("job_id", metavar="ID")
@runs
async def inspect(omit_env: bool, redact_env: str, as_json: bool, job_id: str) -> None:
    """Show all about one job."""
    async with host_of(job_id) as host:
        job = await find_job(host, job_id)
    emit(details(job, omit_env=omit_env, redacted=redact_env.split(",")), job, as_json)


def details(job: ActiveJob, *, omit_env: bool = False, redacted: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return what `inspect` shows, line by line."""
    config = job.job.config
    rows = [
        ("ID", job.job.id),
        ("Args", " ".join(config.args)),
        ("Status", job.status.name.lower()),
        ("CreatedAt", _stamp(job.created_at)),
        ("StartedAt", _stamp(job.started_at)),
        ("EndedAt", _stamp(job.ended_at)),
        ("PID", "" if job.pid is None else str(job.pid)),
        ("ExitStatus", "" if job.exit_status is None else str(job.exit_status)),
        ("Error", job.error or ""),
        ("IP Address", job.internal_ip),
    ]
    rows += [(f"Mountspec[{number}]", spec.id) for number, spec in enumerate(job.job.mountspecs)]
    rows += [(f"Volume[{binding.target}]", binding.volume) for binding in config.volumes]
    rows += sorted(job.job.metadata.items())
    if not omit_env:
        env = {name: REDACTED if name in redacted else value for name, value in config.env.items()}
        rows += [(f"ENV[{name}]", value) for name, value in sorted(env.items())]
    return rows


def _stamp(moment: datetime) -> str:
    return "" if moment == ZERO_TIME else moment.isoformat().replace("+00:00", "Z")


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every job of this machine's host, discoverd last.")
@click.argument("job_ids", metavar="ID...", nargs=-1)
@runs
async def stop(everything: bool, job_ids: tuple[str, ...]) -> None:
    """Stop jobs: SIGTERM, after 30 s SIGKILL."""
    if not job_ids and not everything:
        raise click.UsageError("which jobs?")
    failed = False
    async with all_hosts() as hosts:
        last: list[str] = []
        if everything:
            active = await hosts[0].client.jobs(active=True)
            last = [key for key, job in active.items() if job.job.metadata.get(META_APP_NAME) == LAST_TO_STOP]
            job_ids = tuple(key for key in active if key not in last)

        async def stop_one(job_id: str) -> bool:
            try:
                host_id, dash, rest = job_id.partition("-")
                if not dash or not rest:
                    click.echo(f"could not parse {job_id}: invalid ID", err=True)
                    return False
                await (await host_named(hosts, host_id)).stop_job(job_id)
            except click.ClickException as error:
                click.echo(f"could not connect to host of {job_id}: {error.message}", err=True)
                return False
            except ApiError as error:
                click.echo(f"could not stop job {job_id}: {error}", err=True)
                return False
            click.echo(f"{job_id} stopped")
            return True

        for group in (job_ids, last):
            failed |= not all(await asyncio.gather(*(stop_one(job_id) for job_id in group)))
    if failed:
        raise click.ClickException("could not stop all jobs")


@click.command("signal-job")
@click.argument("job_id", metavar="ID")
@click.argument("number", metavar="SIGNAL", type=int)
@runs
async def signal_job(job_id: str, number: int) -> None:
    """Send a signal to a job's main process."""
    async with host_of(job_id) as host:
        await host.signal_job(job_id, number)
    click.echo(f"sent signal {number} to {job_id} successfully")
