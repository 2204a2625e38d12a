"""`flynn limit`: resource limits of process types."""

from __future__ import annotations

from flynn.cli import limits
from flynn.cli.command import argument, leaf, option, tree
from flynn.cli.context import Context, say, show
from flynn.cli.errors import CliError
from flynn.cli.output import table
from flynn.cli.releasing import current_release, deploy_changed, release_or_empty

LIMIT = """
usage: flynn limit [-t <proc>]
       flynn limit set <proc> <var>=<val>...

Manage resource limits for an application.

Options:
    -t, --process-type <proc>  set or read limits for specified process type

Commands:
    With no arguments, shows a list of resource limits.

    set    sets value of one or more resource limits

Examples:

    $ flynn limit
    web:     cpu=1000  max_fd=10000  memory=1GB  temp_disk=100MB

    $ flynn limit set web memory=512MB max_fd=12000 cpu=500
    Created release 5058ae7964f74c399a240bdd6e7d1bcb
"""


async def listing(context: Context, process_type: str | None) -> None:
    async with context.controller() as controller:
        release = await current_release(controller, context.app)
    if release is None:
        return
    if process_type and process_type not in release.processes:
        raise CliError(f'unknown process type "{process_type}"')
    rows = []
    for type in [process_type] if process_type else sorted(release.processes):
        resources = release.processes[type].resources
        rows.append([f"{type}:", *(limits.shown(name, resources[name]) for name in sorted(resources))])
        if len(rows[-1]) == 1:
            rows[-1].append("")
    show(table(rows), end="")


async def set_limits(context: Context, process: str, vars: tuple[str, ...]) -> None:
    from flynn.types.codec import replace
    from flynn.types.release import ProcessType
    from flynn.types.resources import DEFAULTS

    given = limits.parse(vars)
    async with context.controller() as controller:
        app = await controller.app(context.app)
        release = await release_or_empty(controller, app)
        if process not in release.processes and process != "slugbuilder":
            say(f'Warning: "{process}" is not an existing process type, setting anyway')
        before = release.processes.get(process) or ProcessType()
        changed = replace(before, resources={**(before.resources or DEFAULTS), **given})
        release = replace(release, processes={**release.processes, process: changed})
        created = await deploy_changed(controller, app, release)
    show(f"Created release {created.id}")


NODES = {
    "limit": tree(
        LIMIT,
        leaf(LIMIT, listing, option("-t", "--process-type")),
        set=leaf(LIMIT, set_limits, argument("process"), argument("vars", many=True)),
    )
}
