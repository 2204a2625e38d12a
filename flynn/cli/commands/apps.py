"""Apps: create, delete, list, info, and the git remotes that name them."""

from __future__ import annotations

from flynn.cli import git
from flynn.cli.command import argument, flag, leaf, option, tree
from flynn.cli.context import Context, ask, say, show
from flynn.cli.errors import Done
from flynn.cli.output import table

CREATE = """
usage: flynn create [-r <remote>] [-y] [<name>]

Create an application in Flynn.

If a <name> is not provided, a random name will be generated.
If run from a git repository, a 'flynn' remote will be created or replaced that
allows deploying the application via git.

Options:
    -r, --remote <remote>  name of git remote to create, empty string for none [default: flynn]
    -y, --yes              skip the confirmation prompt if the git remote already exists

Examples:

    $ flynn create turkeys-stupefy-perry
    Created turkeys-stupefy-perry
"""

DELETE = """
usage: flynn delete [-y] [-r <remote>]

Delete an app.

Options:
    -y, --yes              skip the confirmation prompt
    -r, --remote <remote>  name of git remote to delete, empty string for none [default: flynn]

Examples:

    $ flynn -a turkeys-stupefy-perry delete
    Are you sure you want to delete the app "turkeys-stupefy-perry"? (yes/no): yes
    Deleted turkeys-stupefy-perry (removed 1 routes, deleted 0 releases, deprovisioned 1 resources)
"""

APPS = """
usage: flynn apps

List all apps.
"""

INFO = """
usage: flynn info

Show information for an app.

Examples:

    $ flynn -a example info
    === example
    Git URL:  https://git.dev.localflynn.com/example.git
    Web URL:  http://example.dev.localflynn.com
"""

REMOTE = """
usage: flynn remote add [<remote>] [-y]

Create a git remote that allows deploying the application via git.
If a name for the remote is not provided 'flynn' will be used.

Options:
    -y, --yes  skip the confirmation prompt if the git remote already exists

Examples:

    $ flynn -a turkeys-stupefy-perry remote add
    Created remote flynn with url https://git.dev.localflynn.com/turkeys-stupefy-perry.git.
"""


def _may_replace(remote: str) -> bool:
    show(f"There is already a git remote called {remote}")
    return ask("Are you sure you want to replace it?")


async def create(context: Context, remote: str, yes: bool, name: str | None) -> None:
    from flynn.types.app import App

    in_repository = bool(remote) and git.in_repository()
    if in_repository and not yes and remote in git.remote_names() and not _may_replace(remote):
        say("Please, declare the desired local git remote name with --remote flag.")
        raise Done(0)
    async with context.controller() as controller:
        app = await controller.create_app(App(name=name or ""))
    if in_repository and context.cluster.git_url:
        git.replace_remote(remote, git.url_of(context.cluster, app.name))
    say(f"Created {app.name}")


async def delete(context: Context, yes: bool, remote: str) -> None:
    app = context.app
    if not yes and not ask(f'Are you sure you want to delete the app "{app}"?'):
        raise Done(0)
    cluster = context.cluster
    async with context.controller() as controller:
        gone = await controller.delete_app(app)
    if remote and cluster.git_url and git.remote_url(remote) == git.url_of(cluster, app):
        git.remove_remote(remote)
    routes, releases = len(gone.deleted_routes or []), len(gone.deleted_releases or [])
    resources = len(gone.deleted_resources or [])
    say(f"Deleted {app} (removed {routes} routes, deleted {releases} releases, deprovisioned {resources} resources)")


async def listing(context: Context) -> None:
    async with context.controller() as controller:
        apps = await controller.apps()
    show(table([["ID", "NAME"], *([app.id, app.name] for app in apps)]), end="")


async def info(context: Context) -> None:
    from flynn.types.errors import ApiError, NotFound

    app = context.app
    show(f"=== {app}")
    async with context.controller() as controller:
        try:
            release = await controller.app_release(app)
        except NotFound:
            release = None
        try:
            routes = await controller.app_routes(app)
        except ApiError:
            routes = []
    rows = []
    if release is None or release.meta.get("git") == "true":
        rows.append(["Git URL:", git.url_of(context.cluster, app)])
    web = next((route for route in routes if route.type == "http"), None)
    if web is not None:
        scheme = "https" if web.certificate is not None or web.tls_cert else "http"
        rows.append(["Web URL:", f"{scheme}://{web.domain}"])
    show(table(rows), end="")


async def remote_add(context: Context, remote: str | None, yes: bool) -> None:
    remote = remote or git.DEFAULT_REMOTE
    if not git.in_repository():
        say("Must be executed within a git repository.")
        return
    async with context.controller() as controller:
        app = await controller.app(context.app)
    if not yes and remote in git.remote_names() and not _may_replace(remote):
        say("Please, declare the desired local git remote name.")
        raise Done(0)
    url = git.url_of(context.cluster, app.name)
    git.replace_remote(remote, url)
    say(f"Created remote {remote} with url {url}.")


_REMOTE = option("-r", "--remote", default=git.DEFAULT_REMOTE)
_YES = flag("-y", "--yes")

NODES = {
    "create": leaf(CREATE, create, _REMOTE, _YES, argument("name", required=False)),
    "delete": leaf(DELETE, delete, _REMOTE, _YES),
    "apps": leaf(APPS, listing),
    "info": leaf(INFO, info),
    "remote": tree(REMOTE, add=leaf(REMOTE, remote_add, _YES, argument("remote", required=False))),
}
