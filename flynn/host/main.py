"""`flynn-host`: the daemon of a machine, and the operator's tool for it.

Only what a subcommand needs is imported when it is chosen: the daemon must stay small, and `ps` must be quick.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from flynn.host.config import BIN_DIR, CONFIG_DIR, HTTP_PORT, LOG_DIR, STATE_DIR
from flynn.host.jobs.partitions import DEFAULT_PARTITIONS
from flynn.version import VERSION

if TYPE_CHECKING:
    from flynn.host.update import Update

COMMANDS = {
    "cli-add-command": "flynn.host.cli.find:cli_add_command",
    "discover": "flynn.host.cli.find:discover",
    "fix": "flynn.host.cli.fix:fix",
    "bootstrap": "flynn.host.cli.setup:bootstrap",
    "collect-debug-info": "flynn.host.cli.debug:collect_debug_info",
    "database": "flynn.host.cli.database:database",
    "destroy-volumes": "flynn.host.cli.destruction:destroy_volumes",
    "download": "flynn.host.cli.download:download",
    "demote": "flynn.host.cli.membership:demote",
    "drain": "flynn.host.cli.drain:drain",
    "init": "flynn.host.cli.setup:init",
    "inspect": "flynn.host.cli.jobs:inspect",
    "join": "flynn.host.cli.joining:join",
    "list": "flynn.host.cli.cluster:list_hosts",
    "log": "flynn.host.cli.output:log",
    "log-sink": "flynn.host.cli.cluster:log_sink",
    "promote": "flynn.host.cli.membership:promote",
    "ps": "flynn.host.cli.jobs:ps",
    "resource-check": "flynn.host.cli.cluster:resource_check",
    "run": "flynn.host.cli.output:run",
    "signal-job": "flynn.host.cli.jobs:signal_job",
    "signal": "flynn.host.cli.jobs:signal_job",
    "status": "flynn.host.cli.cluster:status",
    "stop": "flynn.host.cli.jobs:stop",
    "tags": "flynn.host.cli.cluster:tags",
    "token": "flynn.host.cli.joining:token",
    "update": "flynn.host.cli.update:update",
    "volume": "flynn.host.cli.volumes:volume",
}


class Commands(click.Group):
    """Loads a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            import importlib

            module, _, name = COMMANDS[cmd_name].partition(":")
            found = getattr(importlib.import_module(module), name)
            assert isinstance(found, click.Command)
            return found
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            click.echo(f'ERROR: "{args[0]}" is not a valid command\n', err=True)
            click.echo(ctx.get_help(), err=True)
            ctx.exit(1)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="%(version)s")
def cli() -> None:
    """Run containers on this machine, and operate the cluster it belongs to."""


@cli.command("help")
@click.argument("command", nargs=-1)
@click.pass_context
def show_help(ctx: click.Context, command: tuple[str, ...]) -> None:
    """Show what a command does and takes."""
    parent = ctx.find_root()
    shown: click.Command = cli
    for word in command:
        found = shown.get_command(parent, word) if isinstance(shown, click.Group) else None
        if found is None:
            click.echo(f'ERROR: "{" ".join(command)}" is not a valid command\n', err=True)
            click.echo(parent.get_help(), err=True)
            ctx.exit(1)
        parent, shown = click.Context(found, info_name=word, parent=parent), found
    click.echo(shown.get_help(parent))


@cli.command()
@click.option("--release", is_flag=True, help="Only what precedes the first dash.")
def version(release: bool) -> None:
    """Show the version."""
    click.echo(VERSION.partition("-")[0] if release else VERSION)


@cli.command()
@click.option("--id", default="", help="Host id, without dashes. Default: the host name.")
@click.option("--external-ip", default="", help="Address this host is reached at. Default: of the default route.")
@click.option("--listen-ip", default="", help="Address the API listens on. Default: the external one.")
@click.option("--http-port", default=HTTP_PORT, show_default=True)
@click.option("--state-dir", default=str(STATE_DIR), envvar="FLYNN_STATE_DIR", show_default=True)
@click.option("--config-dir", default=str(CONFIG_DIR), envvar="FLYNN_CONFIG_DIR", show_default=True)
@click.option("--log-dir", default=str(LOG_DIR), show_default=True, help="One file per app.")
@click.option("--bridge-name", default="flynnbr0", show_default=True)
@click.option("--zpool-name", default="flynn-default", show_default=True)
@click.option("--vol-provider", type=click.Choice(["zfs", "directory"]), default="zfs", show_default=True)
@click.option("--disk-reserve", default="", help="What jobs may not have of the state's disk, as 2G. [5 %, at most 2G]")
@click.option("--volume-quota", default="0", help="Size limit of volumes whose creator names none, as 10G. 0 is none.")
@click.option("--cgroup-root", default="flynn", show_default=True, help="Below each hierarchy's mount point.")
@click.option("--partitions", default=DEFAULT_PARTITIONS, show_default=True)
@click.option("--tags", default="", help="k=v,k2 ...; a bare key means true.")
@click.option("--max-job-concurrency", default=4, show_default=True, help="Jobs launched at a time.")
@click.option("--force", is_flag=True, help="Stop all jobs an earlier daemon has left.")
@click.option("--peer-ips", default="", help="Addresses of hosts of an existing cluster.")
@click.option("--bin-dir", default=str(BIN_DIR), show_default=True, help="Links here lead to the program.")
@click.option("--program-dir", default="", help="Of later releases. Default: `versions` in this installation.")
@click.pass_context
def daemon(ctx: click.Context, /, **options: Any) -> None:
    """Run this machine's jobs, until SIGTERM. The jobs go on without the daemon and are found again by the next one."""
    from datetime import timedelta

    from flynn import daemon as process
    from flynn.host.config import configured
    from flynn.host.daemon import running

    start: DaemonStart = ctx.find_root().meta["flynn.start"]
    config = configured(options, start.flags)
    if start.trial is not None:
        from flynn.host.trial import prove

        prove(config, start.trial)
        return
    update = start.update
    update.watch_the_start()
    try:
        process.run(
            "flynn-host",
            lambda: running(config, update),
            grace=timedelta(seconds=20),
            making_way=update.making_way,
        )
    finally:
        if update.asked:  # also when leaving went wrong: the new program was promised
            update.become()


@dataclass(frozen=True, slots=True)
class DaemonStart:
    """How a daemon was started, before its options were read."""

    flags: list[str]  # the command line after `daemon`, without what host.json has added
    update: Update
    trial: int | None  # the descriptor to prove itself on, instead of serving

    @classmethod
    def read(cls, flags: list[str]) -> DaemonStart:
        """Take what is meant for this process alone out of the environment."""
        from flynn.daemon import environment
        from flynn.host.handover import Handover
        from flynn.host.update import TRIAL, Update, own_program

        trial = os.environ.pop(TRIAL, "")
        handover = Handover.take(os.environ)
        called = own_program(sys.argv[0], sys.executable)
        update = Update(called, ["daemon", *flags], dict(os.environ), handover, final_environment=environment)
        return cls(flags, update, int(trial) if trial else None)


def main() -> None:
    """Entry point of the console script."""
    args = sys.argv[1:]
    if args[:1] == ["daemon"]:
        start = DaemonStart.read(args[1:])
        try:
            _run(args, start)
        except SystemExit as error:
            if error.code not in (None, 0):
                reason = error.code if isinstance(error.code, str) else _innermost(error.__context__)
                start.update.go_back(f"its start failed: {reason}")
            raise
        except Exception as error:  # The edge: whatever it is, the program before is to serve.
            start.update.go_back(f"its start failed: {error!r}")
            raise
    else:
        _run(args, None)


def _innermost(error: BaseException | None) -> str:
    """The first failure in a group of them; the rest is in the daemon's log."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)


def _run(args: list[str], start: DaemonStart | None) -> None:
    from flynn.daemon import ConfigError
    from flynn.host.config import read_host_file
    from flynn.types.errors import ApiError

    try:
        if start is not None:
            # The file's arguments come first, so that the command line wins where both name an option.
            file = read_host_file(_config_dir(start.flags))
            os.environ.update(file.env)
            args = ["daemon", *file.args, *start.flags]
        with cli.make_context("flynn-host", args) as context:
            context.meta["flynn.start"] = start
            cli.invoke(context)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (ConfigError, ApiError) as error:
        sys.exit(f"flynn-host: {error}{_what_to_do(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def _what_to_do(error: Exception) -> str:
    """Name the next command, where a part of the platform does not answer."""
    from flynn.types.errors import Unreachable

    if not isinstance(error, Unreachable):
        return ""
    if f"127.0.0.1:{os.environ.get('FLYNN_HOST_PORT', HTTP_PORT)}" in str(error):
        return "\nThe daemon of this machine does not answer; see: systemctl status flynn-host"
    if ":1111" in str(error):
        return "\ndiscoverd does not answer; see: flynn-host ps -a, flynn-host fix"
    return "\nsee: flynn-host list, flynn-host status"


def _config_dir(flags: list[str]) -> Any:
    from pathlib import Path

    for position, flag in enumerate(flags):
        if flag == "--config-dir" and position + 1 < len(flags):
            return Path(flags[position + 1])
        if flag.startswith("--config-dir="):
            return Path(flag.partition("=")[2])
    return Path(os.environ.get("FLYNN_CONFIG_DIR") or CONFIG_DIR)


if __name__ == "__main__":
    main()
