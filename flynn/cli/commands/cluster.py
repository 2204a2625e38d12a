"""`flynn cluster`: which clusters this user knows, and what git has to know about them."""

from __future__ import annotations

import sys
from dataclasses import replace

from flynn.cli import config, git
from flynn.cli.command import argument, flag, leaf, option, tree
from flynn.cli.context import Context, say, show
from flynn.cli.errors import CliError
from flynn.cli.output import table

USAGE = """
usage: flynn cluster
       flynn cluster add [-f] [-d] [--git-url <giturl>] [--no-git] [--image-url <imageurl>] [-p <tlspin>] <cluster-name> <domain> <key>
       flynn cluster remove <cluster-name>
       flynn cluster default [<cluster-name>]
       flynn cluster log-sink
       flynn cluster log-sink add syslog [--use-ids] [--insecure] [--format <format>] <url> [<prefix>]
       flynn cluster log-sink remove <id>

Manage Flynn clusters.

Commands:
    With no arguments, shows a list of configured clusters.

    add       adds <cluster-name> to the list of configured clusters
    remove    removes <cluster-name> from the list of configured clusters
    default   shows or sets the default cluster
    log-sink  lists, adds and removes log sinks of the cluster

Options:
    -f, --force               replace an existing cluster with the same name or URL
    -d, --default             make it the default cluster
    --git-url <giturl>        git URL [default: https://git.<domain>]
    --no-git                  do not set up git
    --image-url <imageurl>    image URL [default: https://images.<domain>]
    -p, --tls-pin <tlspin>    SHA-256 of the controller's certificate, in base64

Examples:

    $ flynn cluster add -p KGCENkp53YF5OvOKkZIry71+czFRkSw2ZdMszZ/0ljs= default dev.localflynn.com e09dc5301d72be755a3d666f617c4600
    Cluster "default" added.
"""  # noqa: E501  # usage lines are contract

DEFAULT_MARK = "(default)"


async def listing(context: Context) -> None:
    rows = [["NAME", "CONTROLLER URL", "GIT URL", "IMAGE URL"]]
    for cluster in context.config.clusters:
        row = [cluster.name, cluster.controller_url, cluster.git_url or "(none)", cluster.image_url or "(none)"]
        rows.append([*row, DEFAULT_MARK] if cluster.name == context.config.default else row)
    show(table(rows), end="")


async def add(
    context: Context,
    force: bool,
    default: bool,
    git_url: str,
    no_git: bool,
    image_url: str,
    docker_push_url: str,
    docker: bool,
    tls_pin: str,
    name: str,
    domain: str,
    key: str,
) -> None:
    cluster = config.cluster_at(domain, name, key, tls_pin)
    domain = cluster.controller_url.removeprefix(config.LEGACY_PREFIX)
    cluster = replace(
        cluster,
        git_url="" if no_git else git_url or cluster.git_url,
        image_url=image_url or cluster.image_url,
        docker_push_url=docker_push_url or (f"https://docker.{domain}" if docker else ""),
    )
    changed = context.config.added(cluster, force=force)
    as_default = default or len(changed.clusters) == 1
    if as_default:
        changed = replace(changed, default=name)
    if cluster.git_url:
        git.require_git()
        async with context.client_of(cluster) as controller:
            certificate = await controller.ca_cert()
        path = context.ca_path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(certificate)
        except OSError as error:
            raise CliError(f"Error writing CA certificate: {error}") from error
        git.set_up(cluster, path)
    # Last, so that a cluster that cannot be reached leaves no entry.
    config.save(changed)
    say(f'Cluster "{name}" added{" and set as default" if as_default else ""}.')


async def remove(context: Context, name: str) -> None:
    cluster = context.config.find(name)
    if cluster is None:
        return
    changed = context.config.removed(name)
    config.save(changed)
    if cluster.git_url:
        git.tear_down(cluster)
    if changed.default != context.config.default and changed.default:
        say(f'Cluster "{name}" removed and "{changed.default}" is now the default cluster.')
    else:
        say(f'Cluster "{name}" removed.')


async def default(context: Context, name: str | None) -> None:
    if name is None:
        rows = [["NAME", "URL"]]
        for cluster in context.config.clusters:
            if cluster.name == context.config.default:
                rows.append([cluster.name, cluster.controller_url, DEFAULT_MARK])
        show(table(rows), end="")
        return
    if context.config.find(name) is None:
        raise CliError(f'Cluster "{name}" does not exist and cannot be set as default.')
    config.save(replace(context.config, default=name))
    say(f'"{name}" is now the default cluster.')


async def sinks(context: Context) -> None:
    from flynn.types.codec import encode

    async with context.controller() as controller:
        listed = await controller.sinks()
    rows = [["ID", "KIND", "CONFIG"]]
    rows += [[s.id, s.kind, encode(s.config).decode() if s.config is not None else ""] for s in listed]
    show(table(rows), end="")


async def add_sink(
    context: Context, kind: str, use_ids: bool, insecure: bool, format: str, url: str, prefix: str | None
) -> None:
    from urllib.parse import urlsplit

    from flynn.types.sink import Sink

    if kind != "syslog":
        raise CliError(f"Invalid log sink kind: {kind}")
    scheme = urlsplit(url).scheme
    if scheme not in ("syslog", "syslog+tls"):
        raise CliError(f"Invalid syslog protocol: {scheme}")
    if format not in ("rfc6587", "newline", "prefixed_newline"):
        raise CliError(f"Invalid syslog format: {format}")
    settings: dict[str, object] = {"url": url, "template": prefix, "use_ids": use_ids, "insecure": insecure}
    settings = {key: value for key, value in settings.items() if value} | {"format": format}
    async with context.controller() as controller:
        sink = await controller.create_sink(Sink(kind=kind, config=settings))
    say(f"Created sink {sink.id}.")


async def remove_sink(context: Context, id: str) -> None:
    async with context.controller() as controller:
        sink = await controller.delete_sink(id)
    say(f"Deleted sink {sink.id}.")


async def git_credentials(context: Context, operation: str) -> None:
    """Hidden: git asks for the password of a cluster's git address."""
    if operation != "get":
        return
    try:
        clusters = context.config.clusters
    except CliError:
        return
    lines: list[str] = []
    for line in sys.stdin:
        if not line.strip():
            break
        lines.append(line.rstrip("\n"))
    show(git.credentials(clusters, "\n".join(lines)), end="")


CREDENTIALS_USAGE = """
usage: flynn git-credentials <operation>

Answers git's questions for the password of a cluster.
"""

NODES = {
    "cluster": tree(
        USAGE,
        leaf(USAGE, listing),
        add=leaf(
            USAGE,
            add,
            flag("-f", "--force"),
            flag("-d", "--default"),
            option("--git-url", default=""),
            flag("--no-git"),
            option("--image-url", default=""),
            option("--docker-push-url", default=""),
            flag("--docker"),
            option("-p", "--tls-pin", default=""),
            argument("name"),
            argument("domain"),
            argument("key"),
        ),
        remove=leaf(USAGE, remove, argument("name")),
        default=leaf(USAGE, default, argument("name", required=False)),
        log_sink=tree(
            USAGE,
            leaf(USAGE, sinks),
            add=leaf(
                USAGE,
                add_sink,
                argument("kind"),
                flag("--use-ids"),
                flag("--insecure"),
                option("--format", default="rfc6587"),
                argument("url"),
                argument("prefix", required=False),
            ),
            remove=leaf(USAGE, remove_sink, argument("id")),
        ),
    ),
    "git-credentials": leaf(CREDENTIALS_USAGE, git_credentials, argument("operation")),
}
