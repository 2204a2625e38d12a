"""Consoles, dumps and restores of an app's databases: jobs with the database's own image, attached to this terminal.

What differs between databases is a table of command lines; what is done with them is the same for all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flynn.cli.command import Node, argument, flag, leaf, option, tree
from flynn.cli.context import Context
from flynn.cli.errors import CliError, Done

if TYPE_CHECKING:
    from flynn.types.job import NewJob
    from flynn.types.release import Release

PAGER = {
    "PAGER": "less",
    "LESS": "--ignore-case --LONG-PROMPT --SILENT --tabs=4 --quit-if-one-screen --no-init --quit-at-eof",
}

Line = Callable[[Mapping[str, str]], list[str]]


@dataclass(frozen=True)
class Database:
    word: str  # of the command line
    provider: str
    title: str
    app_var: str  # names the database's own app
    required: tuple[str, ...]  # variables the job gets
    console_word: str
    console: Line
    dump: Line
    restore: Line
    restore_needs_data: bool = False
    parallel_restore: Callable[[Mapping[str, str], int], list[str]] | None = None
    kind: str = "database"
    wanted: tuple[str, ...] = field(default=())  # variables the command lines need besides


def _pg_restore(env: Mapping[str, str]) -> list[str]:
    return ["pg_restore", "-d", env["PGDATABASE"], "-n", "public", "--clean", "--if-exists", "--no-owner", "--no-acl"]


def _pg_restore_parallel(env: Mapping[str, str], jobs: int) -> list[str]:
    line = " ".join(_pg_restore(env))
    return ["bash", "-c", f"set -o pipefail; cat > /data/temp.dump && {line} --jobs {jobs} /data/temp.dump"]


def _mysql(env: Mapping[str, str]) -> list[str]:
    return ["mysql", "-u", env["MYSQL_USER"], "-D", env["MYSQL_DATABASE"]]


def _mongo(env: Mapping[str, str]) -> list[str]:
    return ["--host", env["MONGO_HOST"], "-u", env["MONGO_USER"], "-p", env["MONGO_PWD"]]


def _redis(env: Mapping[str, str]) -> list[str]:
    return ["-h", f"{env['FLYNN_REDIS']}.discoverd", "-a", env["REDIS_PASSWORD"]]


POSTGRES = Database(
    word="pg",
    provider="postgres",
    title="postgres",
    app_var="FLYNN_POSTGRES",
    required=("PGHOST", "PGUSER", "PGPASSWORD", "PGDATABASE"),
    console_word="psql",
    console=lambda env: ["psql"],
    dump=lambda env: ["pg_dump", "--format=custom", "--no-owner", "--no-acl"],
    restore=_pg_restore,
    parallel_restore=_pg_restore_parallel,
)

DATABASES = (
    POSTGRES,
    Database(
        word="mysql",
        provider="mysql",
        title="mysql",
        app_var="FLYNN_MYSQL",
        required=("MYSQL_HOST", "MYSQL_USER", "MYSQL_PWD", "MYSQL_DATABASE"),
        console_word="console",
        console=_mysql,
        dump=lambda env: ["mysqldump", "-h", env["MYSQL_HOST"], "-u", env["MYSQL_USER"], env["MYSQL_DATABASE"]],
        restore=_mysql,
    ),
    Database(
        word="mongodb",
        provider="mongodb",
        title="mongodb",
        app_var="FLYNN_MONGO",
        required=("MONGO_HOST", "MONGO_USER", "MONGO_PWD", "MONGO_DATABASE"),
        console_word="mongo",
        console=lambda env: ["mongo", *_mongo(env), env["MONGO_DATABASE"]],
        dump=lambda env: ["/bin/dump-flynn-mongodb", *_mongo(env), "--db", env["MONGO_DATABASE"]],
        restore=lambda env: ["/bin/restore-flynn-mongodb", *_mongo(env), "--db", env["MONGO_DATABASE"]],
        restore_needs_data=True,
    ),
    Database(
        word="redis",
        provider="redis",
        title="redis",
        app_var="FLYNN_REDIS",
        required=(),
        wanted=("REDIS_PASSWORD",),
        console_word="redis-cli",
        console=lambda env: ["redis-cli", *_redis(env)],
        dump=lambda env: ["/bin/dump-flynn-redis", *_redis(env)],
        restore=lambda env: ["/bin/restore-flynn-redis", *_redis(env)],
        kind="server",
    ),
)


def usage(database: Database) -> str:
    jobs = " [-j <jobs>]" if database.parallel_restore else ""
    jobs_help = "\n    -j, --jobs <jobs>  number of restore jobs to run in parallel [default: 1]" if jobs else ""
    word, console = database.word, database.console_word
    return f"""
usage: flynn {word} {console} [--] [<argument>...]
       flynn {word} dump [-q] [-f <file>]
       flynn {word} restore [-q] [-f <file>]{jobs}

Commands:
    {console.ljust(8)} Open a console to a {database.title} {database.kind}. Arguments that start with a dash must
             follow --.
    dump     Dump a {database.title} {database.kind} to a file or stdout.
    restore  Restore a {database.title} dump from a file or stdin.

Options:
    -f, --file <file>  name of dump file
    -q, --quiet        don't print progress{jobs_help}

Examples:

    $ flynn {word} {console}

    $ flynn {word} dump -f latest.dump

    $ flynn {word} restore -f latest.dump
"""


def missing(database: Database) -> CliError:
    return CliError(
        f"No {database.title} {database.kind} found. Provision one with `flynn resource add {database.provider}`"
    )


async def _app_release(context: Context) -> Release:
    from flynn.cli.main import explain
    from flynn.types.errors import ApiError

    async with context.controller() as controller:
        try:
            return await controller.app_release(context.app)
        except ApiError as error:
            raise CliError(f"error getting app release: {explain(error)}") from error


async def _job(context: Context, database: Database, line: Callable[[Mapping[str, str]], list[str]]) -> NewJob:
    """A job under the user's app with the release of the database's app, which has its client programs."""
    from flynn.types.job import NewJob

    env = (await _app_release(context)).env
    if not env.get(database.app_var):
        raise missing(database)
    for name in (*database.required, *database.wanted):
        if not env.get(name):
            raise CliError(f"missing {name} in app environment")
    async with context.controller() as controller:
        release = await controller.app_release(env[database.app_var])
    return NewJob(
        release=release.id,
        args=line(env),
        env={name: env[name] for name in database.required},
        disable_log=True,
    )


async def _attach(context: Context, job: NewJob, *, source: int | None = None, target: int | None = None) -> int:
    from flynn.cli import session

    async with context.controller() as controller:
        return await session.attached(controller, context.app, job, source=source, target=target)


def console_of(database: Database) -> Node:
    async def console(context: Context, arguments: tuple[str, ...]) -> None:
        from flynn.cli import session
        from flynn.types.codec import replace

        job = await _job(context, database, database.console)
        job = replace(job, args=[*job.args, *arguments], env={**job.env, **PAGER})
        raise Done(await _attach(context, session.with_terminal(job, context.environ)))

    return leaf(usage(database), console, argument("arguments", required=False, many=True))


def dump_of(database: Database) -> Node:
    async def dump(context: Context, quiet: bool, file: str | None) -> None:
        job = await _job(context, database, database.dump)
        if file is None:
            if sys.stdout.isatty():
                raise CliError("refusing to write a dump to the terminal; name a file with -f or redirect the output")
            raise Done(await _attach(context, job, source=_nothing()))
        # Beside, then renamed: a dump that failed half-way is not mistaken for a whole one.
        partial = Path(f"{file}.partial")
        try:
            with partial.open("wb") as target:
                status = await _attach(context, job, source=_nothing(), target=target.fileno())
            if status == 0:
                partial.replace(file)
        except OSError as error:
            raise CliError(f"{file}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
        raise Done(status)

    return leaf(usage(database), dump, flag("-q", "--quiet"), option("-f", "--file"))


def restore_of(database: Database) -> Node:
    async def restore(context: Context, quiet: bool, file: str | None, jobs: int = 1) -> None:
        from flynn.types.codec import replace

        parallel = database.parallel_restore if jobs > 1 else None
        job = await _job(
            context, database, (lambda env: parallel(env, jobs)) if parallel is not None else database.restore
        )
        if parallel is not None or database.restore_needs_data:
            job = replace(job, data=True)
        if file is None:
            raise Done(await _attach(context, job))
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CliError(f"{file}: {error.strerror}") from error
        try:
            raise Done(await _attach(context, job, source=descriptor))
        finally:
            os.close(descriptor)

    options = [flag("-q", "--quiet"), option("-f", "--file")]
    if database.parallel_restore is not None:
        options.append(option("-j", "--jobs", type=int, default=1))
    return leaf(usage(database), restore, *options)


def _nothing() -> int:
    return os.open(os.devnull, os.O_RDONLY)


NODES = {
    database.word: tree(
        usage(database),
        **{database.console_word: console_of(database)},
        dump=dump_of(database),
        restore=restore_of(database),
    )
    for database in DATABASES
}
