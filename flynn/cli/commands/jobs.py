"""Jobs: list, kill, run, and what they log."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from flynn.cli.command import argument, flag, leaf, option
from flynn.cli.context import Context, say, show
from flynn.cli.errors import CliError, Done
from flynn.cli.output import age, log_time, table

if TYPE_CHECKING:
    from flynn.controller.wire import LogMessage

PS = """
usage: flynn ps [-a] [-c] [-q] [-t <type>]

List jobs.

Options:
    -a, --all           Show all jobs (default is running and pending)
    -c, --command       Show command
    -q, --quiet         Only display IDs
    -t, --type <type>   Show only processes of <type>

Examples:

    $ flynn ps
    ID                                          TYPE  STATE  CREATED        RELEASE
    flynn-7db4f2b6-e9b2-4d1b-b5e6-8ac2fc1e4e51  web   up     8 minutes ago  4b0dfa86-7b18-4b1f-8a95-1a2b0a7a9a0f
"""

KILL = """
usage: flynn kill <job>...

Kill jobs.
"""

LOG = """
usage: flynn log [-f] [-j <id>] [-n <lines>] [-r] [-s] [-t <type>] [-i]

Stream log for an app.

Options:
    -f, --follow               stream new lines
    -j, --job <id>             filter logs to a specific job ID
    -n, --number <lines>       return at most n lines from the log buffer [default: -1]
    -r, --raw-output           output raw log messages with no prefix
    -s, --split-stderr         send stderr lines to stderr
    -t, --process-type <type>  filter logs to a specific process type
    -i, --init                 output initialization logs (these are hidden by default)
"""

RUN = """
usage: flynn run [-d] [-r <release>] [-e <entrypoint>] [-l] [--limits <limits>] [--profiles <profiles>] [--mounts-from <proc>] [--] <command> [<argument>...]

Run a job.

Options:
    -d, --detached           run job without connecting io streams (implies --enable-log)
    -r <release>             id of release to run (defaults to current app release)
    -e <entrypoint>          [DEPRECATED] overwrite the default entrypoint of the release's image
    -l, --enable-log         send output to log streams
    --limits <limits>        comma separated limits for the run job (see "flynn limit -h" for format)
    --profiles <profiles>    comma separated job profiles
    --mounts-from <proc>     copy mounts from the given process type
"""  # noqa: E501  # usage lines are contract

SHOWN_STATES = ("up", "pending", "blocked")
GIT_INIT = "/runner/init"
NEVER = datetime.min.replace(tzinfo=UTC)


async def ps(context: Context, all: bool, command: bool, quiet: bool, type: str | None) -> None:
    async with context.controller() as controller:
        jobs = await controller.jobs(context.app)
    jobs.sort(key=lambda job: job.created_at or NEVER)
    now = datetime.now(UTC)
    rows = [["ID", "TYPE", "STATE", "CREATED", "RELEASE", *(["COMMAND"] if command else [])]]
    for job in jobs:
        kind = job.type or "run"
        if (not all and job.state not in SHOWN_STATES) or (type and kind != type):
            continue
        row = [job.id or job.uuid, kind, job.state, age(job.created_at, now), job.release]
        rows.append([*row, " ".join(job.args)] if command else row)
    if quiet:
        for row in rows[1:]:
            show(row[0])
    else:
        show(table(rows), end="")
        for job in jobs:
            # Beside the table, which scripts read.
            if job.waits and job.reason and (not type or job.type == type):
                say(f"{job.id or job.uuid} ({job.type}) is {job.state}: {job.reason}")


async def kill(context: Context, jobs: tuple[str, ...]) -> None:
    from flynn.cli.main import explain
    from flynn.types.errors import ApiError

    failed = False
    async with context.controller() as controller:
        for job in jobs:
            try:
                await controller.kill_job(context.app, job)
            except ApiError as error:
                say(f"ERROR: could not kill job {job}: {explain(error)}")
                failed = True
            else:
                say(f"Job {job} killed.")
    if failed:
        raise CliError("Could not kill all jobs.")


async def log(
    context: Context,
    follow: bool,
    job: str | None,
    number: int,
    raw_output: bool,
    split_stderr: bool,
    process_type: str | None,
    init: bool,
) -> None:
    from flynn.controller.wire import LogMessage
    from flynn.types.codec import decode

    streams = ["stdout", "stderr", *(["init"] if init else [])]
    async with context.controller() as controller:
        async with controller.app_log(
            context.app,
            follow=follow,
            lines=number if number >= 0 else None,
            job_id=job or "",
            process_type=process_type,
            stream_types=streams,
        ) as chunks:
            rest = b""
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        _show_line(decode(line, LogMessage), raw=raw_output, split=split_stderr, init=init)
                sys.stdout.flush()
            if rest.strip():
                _show_line(decode(rest, LogMessage), raw=raw_output, split=split_stderr, init=init)


def _show_line(message: LogMessage, *, raw: bool, split: bool, init: bool) -> None:
    match message.stream:
        case "stdout":
            target = sys.stdout
        case "stderr":
            target = sys.stderr if split else sys.stdout
        case "init" if init:
            target = sys.stderr
        case _:
            return
    if raw:
        text = message.msg
    else:
        origin = f"{message.source}[{message.process_type}.{message.job_id}]"
        text = f"{log_time(message.timestamp)} {origin}: {message.msg}"
    target.write(text + "\n")


async def run(
    context: Context,
    detached: bool,
    release: str | None,
    entrypoint: str | None,
    enable_log: bool,
    limits: str | None,
    profiles: str | None,
    mounts_from: str | None,
    command: tuple[str, ...],
) -> None:
    from flynn.cli import limits as resource_limits
    from flynn.cli import session
    from flynn.cli.releasing import current_release
    from flynn.types.job import NewJob

    args = list(command)
    if entrypoint:
        say("WARN: The --entrypoint flag is deprecated and will be removed in future.")
        args = [entrypoint, *args]
    resources = resource_limits.of_job(limits.split(",")) if limits else {}
    async with context.controller() as controller:
        if release is None:
            current = await current_release(controller, context.app)
            if current is None:
                raise CliError("No app release, specify a release with -release")
            if not current.artifacts:
                raise CliError("App release has no image, push a release first")
            release = current.id
        target = await controller.release(release)
        if target.meta.get("git") == "true" and args[0] != GIT_INIT:
            args = [GIT_INIT, *args]
        job = NewJob(
            release=release,
            release_env=True,
            args=args,
            disable_log=not detached and not enable_log,
            resources=resources,
            profiles=profiles.split(",") if profiles else [],
            mounts_from=mounts_from or "",
        )
        if detached:
            started = await controller.run_job(context.app, job)
            say(started.id)
            return
        status = await session.attached(controller, context.app, session.with_terminal(job, context.environ))
    raise Done(status)


NODES = {
    "ps": leaf(PS, ps, flag("-a", "--all"), flag("-c", "--command"), flag("-q", "--quiet"), option("-t", "--type")),
    "kill": leaf(KILL, kill, argument("jobs", many=True)),
    "log": leaf(
        LOG,
        log,
        flag("-f", "--follow"),
        option("-j", "--job"),
        option("-n", "--number", type=int, default=-1),
        flag("-r", "--raw-output"),
        flag("-s", "--split-stderr"),
        option("-t", "--process-type"),
        flag("-i", "--init"),
    ),
    "run": leaf(
        RUN,
        run,
        flag("-d", "--detached"),
        option("-r", "--release"),
        option("-e", "--entrypoint"),
        flag("-l", "--enable-log"),
        option("--limits"),
        option("--profiles"),
        option("--mounts-from"),
        argument("command", many=True),
        options_first=True,
    ),
}
