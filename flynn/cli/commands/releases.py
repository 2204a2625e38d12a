"""`flynn release`: what an app's releases are, and making another one the current."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flynn.cli.command import argument, flag, leaf, tree
from flynn.cli.context import Context, ask, say, show
from flynn.cli.errors import CliError, Done
from flynn.cli.output import age, moment, table
from flynn.cli.releasing import deploy_changed

if TYPE_CHECKING:
    from flynn.types.release import ProcessType, Release

RELEASE = """
usage: flynn release [-q|--quiet]
       flynn release show [--json] [<id>]
       flynn release update <file> [<id>] [--clean]
       flynn release delete [-y] <id>
       flynn release rollback [-y] [<id>]

Manage app releases.

Options:
    -q, --quiet  only display release IDs
    --json       print release configuration in JSON format
    --clean      update from a clean slate (ignoring prior config)
    -y, --yes    skip the confirmation prompt

Commands:
    With no arguments, shows a list of releases associated with the app.

    show      show information about a release (defaults to the current one)
    update    create a new release from <file> (JSON, same format as --json), on top of release <id> or the current one
    delete    delete a release, with its files
    rollback  make the previous release, or <id>, the current one
"""

REPLACED = ("args", "ports", "volumes", "mounts", "service", "linux_capabilities", "allowed_devices", "profiles")
SWITCHES = ("omni", "host_network", "host_pid_namespace", "resurrect", "data")


async def listing(context: Context, quiet: bool) -> None:
    async with context.controller() as controller:
        releases = await controller.app_releases(context.app)
    if quiet:
        for release in releases:
            show(release.id)
        return
    now = datetime.now(UTC)
    show(table([["ID", "Created"], *([release.id, age(release.created_at, now)] for release in releases)]), end="")


async def show_release(context: Context, json: bool, id: str | None) -> None:
    async with context.controller() as controller:
        release = await (controller.release(id) if id else controller.app_release(context.app))
        artifacts = [] if json else [await controller.artifact(artifact) for artifact in release.artifacts]
    if json:
        show(as_json(release))
        return
    rows = [["ID:", release.id]]
    rows += [[f"Artifact[{index}]:", f"{artifact.type}+{artifact.uri}"] for index, artifact in enumerate(artifacts)]
    rows += [["Process Types:", ", ".join(sorted(release.processes))], ["Created At:", moment(release.created_at)]]
    rows += [[f"ENV[{name}]", value] for name, value in sorted(release.env.items())]
    rows += [[f"META[{name}]", value] for name, value in sorted(release.meta.items())]
    show(table(rows), end="")


def as_json(release: Release) -> str:
    """One line, maps sorted by key, fields in their order."""
    import json

    from flynn.types.codec import builtins

    document = builtins(release)
    for name in ("env", "meta", "processes"):
        if name in document:
            document[name] = dict(sorted(document[name].items()))
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


async def update(context: Context, file: str, id: str | None, clean: bool) -> None:
    from flynn.types.codec import decode, replace
    from flynn.types.errors import ApiError
    from flynn.types.release import Release

    try:
        given = decode(Path(file).read_bytes(), Release)
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from error
    except ApiError as error:
        raise CliError(f"{file}: {error.message}") from error
    async with context.controller() as controller:
        app = await controller.app(context.app)
        release = await (controller.release(id) if id else controller.app_release(app.id))
        changed = replace(given, artifacts=release.artifacts) if clean else merged(release, given)
        created = await deploy_changed(controller, app, changed)
    say(f"Created release {created.id}.")


def merged(release: Release, given: Release) -> Release:
    """The release with everything that `given` says on top; what it does not say stays."""
    from flynn.types.codec import replace

    processes = dict(release.processes)
    for type, process in given.processes.items():
        processes[type] = _merged_process(processes[type], process) if type in processes else process
    return replace(release, env={**release.env, **given.env}, meta={**release.meta, **given.meta}, processes=processes)


def _merged_process(process: ProcessType, given: ProcessType) -> ProcessType:
    from flynn.types.codec import replace

    changes: dict[str, object] = {name: value for name in REPLACED if (value := getattr(given, name))}
    changes |= {name: True for name in SWITCHES if getattr(given, name)}
    changes["env"] = {**process.env, **given.env}
    changes["resources"] = {**process.resources, **given.resources}
    return replace(process, **changes)


async def delete(context: Context, yes: bool, id: str) -> None:
    if not yes and not ask(f'Are you sure you want to delete release "{id}"?'):
        raise Done(0)
    async with context.controller() as controller:
        gone = await controller.delete_release(context.app, id)
    if gone.remaining_apps:
        others = len(gone.remaining_apps)
        say(f"Release scaled down for app but not fully deleted (still associated with {others} other apps)")
    else:
        say(f"Deleted release {id} (deleted {len(gone.deleted_files or [])} files)")


async def rollback(context: Context, yes: bool, id: str | None) -> None:
    async with context.controller() as controller:
        current = await controller.app_release(context.app)
        if id is None:
            releases = await controller.app_releases(context.app)
            if len(releases) < 2:
                raise CliError("Not enough releases to perform a rollback.")
            id = releases[1].id
        if id == current.id:
            raise CliError("Release id given is the current release.")
        if not yes and not ask(f'Are you sure you want to rollback to release "{id}"?'):
            raise Done(0)
        say(f"Rolling back to release {id} from {current.id}.")
        await controller.deploy(context.app, id)
    say(f"Successfully rolled back to release {id}.")


_YES = flag("-y", "--yes")
_OPTIONAL_ID = argument("id", required=False)

NODES = {
    "release": tree(
        RELEASE,
        leaf(RELEASE, listing, flag("-q", "--quiet")),
        show=leaf(RELEASE, show_release, flag("--json"), _OPTIONAL_ID),
        update=leaf(RELEASE, update, argument("file"), _OPTIONAL_ID, flag("--clean")),
        delete=leaf(RELEASE, delete, _YES, argument("id")),
        rollback=leaf(RELEASE, rollback, _YES, _OPTIONAL_ID),
    )
}
