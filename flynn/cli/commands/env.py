"""Environment variables of the release, and metadata of the app."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flynn.cli.command import argument, leaf, option, tree
from flynn.cli.context import Context, say, show
from flynn.cli.errors import CliError
from flynn.cli.output import table
from flynn.cli.releasing import current_release, deploy_changed, release_or_empty

if TYPE_CHECKING:
    from flynn.types.release import Release

ENV = """
usage: flynn env [-t <proc>]
       flynn env set [-t <proc>] <var>=<val>...
       flynn env unset [-t <proc>] <var>...
       flynn env get [-t <proc>] <var>

Manage app environment variables.

Options:
    -t, --process-type <proc>  set or read env for specified process type

Commands:
    With no arguments, shows a list of environment variables.

    set    sets value of one or more env variables
    unset  deletes one or more variables
    get    returns the value of variable

Examples:

    $ flynn env set FOO=bar BAZ=foobar
    Created release 5058ae7964f74c399a240bdd6e7d1bcb.

    $ flynn env get FOO
    bar
"""

META = """
usage: flynn meta
       flynn meta set <var>=<val>...
       flynn meta unset <var>...

Manage metadata for an application.

Examples:

    $ flynn meta set foo=bar baz=qux
    $ flynn meta
    KEY  VALUE
    baz  qux
    foo  bar
"""


def assignments(words: Sequence[str]) -> dict[str, str]:
    """`VAR=VAL` words as a mapping."""
    for word in words:
        if "=" not in word or word.startswith("="):
            raise CliError(f'invalid var format: "{word}"')
    return dict(word.split("=", 1) for word in words)


async def listing(context: Context, process_type: str | None) -> None:
    async with context.controller() as controller:
        release = await current_release(controller, context.app)
    if release is None:
        return
    env = dict(release.env)
    if process_type and process_type in release.processes:
        env |= release.processes[process_type].env
    for line in sorted((f"{name}={value}" for name, value in env.items()), key=str.encode):
        show(line)


async def get(context: Context, process_type: str | None, var: str) -> None:
    async with context.controller() as controller:
        release = await current_release(controller, context.app)
    if release is None:
        raise CliError("no app release found")
    if process_type:
        if process_type not in release.processes:
            raise CliError(f'process type "{process_type}" not found in release {release.id}')
        if var in release.processes[process_type].env:
            show(release.processes[process_type].env[var])
            return
    if var not in release.env:
        raise CliError(f'var "{var}" not found in release "{release.id}"')
    show(release.env[var])


def changed_env(release: Release, process_type: str | None, changes: dict[str, str | None]) -> Release:
    """The release with variables set, or removed where the value is None."""
    from flynn.types.codec import replace
    from flynn.types.release import ProcessType

    def applied(env: dict[str, str]) -> dict[str, str]:
        merged = {**env, **changes}
        return {name: value for name, value in merged.items() if value is not None}

    if not process_type:
        return replace(release, env=applied(release.env))
    if process_type not in release.processes and release.id:
        raise CliError(f'process "{process_type}" in release {release.id} not found')
    process = release.processes.get(process_type) or ProcessType()
    processes = {**release.processes, process_type: replace(process, env=applied(process.env))}
    return replace(release, processes=processes)


async def change(context: Context, process_type: str | None, changes: dict[str, str | None]) -> None:
    async with context.controller() as controller:
        app = await controller.app(context.app)
        release = changed_env(await release_or_empty(controller, app), process_type, changes)
        created = await deploy_changed(controller, app, release)
    say(f"Created release {created.id}.")


async def set_env(context: Context, process_type: str | None, vars: tuple[str, ...]) -> None:
    await change(context, process_type, {**assignments(vars)})


async def unset_env(context: Context, process_type: str | None, vars: tuple[str, ...]) -> None:
    await change(context, process_type, dict.fromkeys(vars))


async def list_meta(context: Context) -> None:
    async with context.controller() as controller:
        app = await controller.app(context.app)
    show(table([["KEY", "VALUE"], *([key, value] for key, value in sorted(app.meta.items()))]), end="")


async def set_meta(context: Context, vars: tuple[str, ...]) -> None:
    given = assignments(vars)
    async with context.controller() as controller:
        app = await controller.app(context.app)
        await controller.set_app_meta(app.id, {**app.meta, **given})


async def unset_meta(context: Context, vars: tuple[str, ...]) -> None:
    async with context.controller() as controller:
        app = await controller.app(context.app)
        await controller.set_app_meta(app.id, {key: value for key, value in app.meta.items() if key not in vars})


_PROCESS = option("-t", "--process-type")
_VARS = argument("vars", many=True)

NODES = {
    "env": tree(
        ENV,
        leaf(ENV, listing, _PROCESS),
        set=leaf(ENV, set_env, _PROCESS, _VARS),
        unset=leaf(ENV, unset_env, _PROCESS, _VARS),
        get=leaf(ENV, get, _PROCESS, argument("var")),
    ),
    "meta": tree(META, leaf(META, list_meta), set=leaf(META, set_meta, _VARS), unset=leaf(META, unset_meta, _VARS)),
}
