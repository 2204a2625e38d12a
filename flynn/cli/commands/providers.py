"""Resource providers, and the databases they make for apps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flynn.cli.command import argument, leaf, tree
from flynn.cli.commands.env import changed_env
from flynn.cli.context import Context, say, show
from flynn.cli.errors import CliError
from flynn.cli.output import table
from flynn.cli.releasing import current_release, deploy_changed, release_or_empty

if TYPE_CHECKING:
    from flynn.controller.client import Controller
    from flynn.types.provider import Provider, Resource

PROVIDER = """
usage: flynn provider
       flynn provider add <name> <url>

Manage resource providers associated with the controller.

Commands:
    With no arguments, displays current providers

    add  creates a new provider <name> at <url>
"""

RESOURCE = """
usage: flynn resource
       flynn resource add <provider>
       flynn resource remove <provider> [<resource>]

Manage resources for the app.

Commands:
    With no arguments, shows a list of resources.

    add     provisions a new resource for the app using <provider>
    remove  removes the resource from the app, with its data
"""


async def list_providers(context: Context) -> None:
    async with context.controller() as controller:
        providers = await controller.providers()
    if providers:
        rows = [["ID", "NAME", "URL"], *([provider.id, provider.name, provider.url] for provider in providers)]
        show(table(rows), end="")


async def add_provider(context: Context, name: str, url: str) -> None:
    from flynn.types.provider import Provider

    async with context.controller() as controller:
        provider = await controller.create_provider(Provider(name=name, url=url))
    say(f"Created provider {provider.name}.")


async def _resources(controller: Controller, app: str) -> list[tuple[Resource, Provider]]:
    found = await controller.app_resources(app)
    return [(resource, await controller.provider(resource.provider)) for resource in found]


async def list_resources(context: Context) -> None:
    async with context.controller() as controller:
        found = await _resources(controller, context.app)
    rows = [["ID", "Provider ID", "Provider Name"]]
    rows += [[resource.id, resource.provider, provider.name] for resource, provider in found]
    show(table(rows), end="")


async def add_resource(context: Context, provider: str) -> None:
    from flynn.types.provider import ResourceReq

    async with context.controller() as controller:
        app = await controller.app(context.app)
        resource = await controller.provision_resource(provider, ResourceReq(apps=[context.app]))
        release = await release_or_empty(controller, app)
        created = await deploy_changed(controller, app, changed_env(release, None, {**resource.env}))
    say(f"Created resource {resource.id} and release {created.id}.")


async def remove_resource(context: Context, provider: str, resource: str | None) -> None:
    async with context.controller() as controller:
        if resource is None:
            found = [
                resource.id
                for resource, owner in await _resources(controller, context.app)
                if provider in (owner.id, owner.name)
            ]
            if not found:
                raise CliError(f"App has no resource for {provider}")
            if len(found) > 1:
                raise CliError(f"App has more than one resource for {provider}, specify resource ID")
            resource = found[0]
        app = await controller.app(context.app)
        removed = await controller.delete_resource(provider, resource)
        release = await current_release(controller, app.id)
        if release is None:
            raise CliError(f"Deleted resource {removed.id}; the app has no release")
        # A variable that was changed since belongs to the user.
        stale = {name: None for name, value in removed.env.items() if release.env.get(name) == value}
        created = await deploy_changed(controller, app, changed_env(release, None, {**stale}))
    say(f"Deleted resource {removed.id}, created release {created.id}.")


NODES = {
    "provider": tree(
        PROVIDER, leaf(PROVIDER, list_providers), add=leaf(PROVIDER, add_provider, argument("name"), argument("url"))
    ),
    "resource": tree(
        RESOURCE,
        leaf(RESOURCE, list_resources),
        add=leaf(RESOURCE, add_resource, argument("provider")),
        remove=leaf(RESOURCE, remove_resource, argument("provider"), argument("resource", required=False)),
    ),
}
