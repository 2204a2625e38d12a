"""`update`: bring a release onto all hosts of the cluster, one after another, then onto the platform's apps."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from flynn.host.cli.access import all_hosts, config_dir, runs, state_dir
from flynn.host.cli.download import setting
from flynn.types.codec import encode
from flynn.version import VERSION

WORDS = {
    "images": "has the images, {layers} layers",
    "program": "has the program, {path}",
    "already": "is at {version} already",
    "daemon": "updated from {was} to {version}, {jobs} jobs go on",
}


@click.command()
@click.option("-r", "--repository", default="", envvar="FLYNN_REPOSITORY", help="A directory, http:// or https://.")
@click.option("--channel", default="", help="Take the version it points at. Default: channel.txt, else stable.")
@click.option("--version", default="", help="vYYYYMMDD.N, instead of a channel.")
@click.option("--hosts-only", is_flag=True, help="Leave the platform's apps as they are.")
@click.option("--apps-only", is_flag=True, help="The hosts are updated already.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@runs
async def update(repository: str, channel: str, version: str, hosts_only: bool, apps_only: bool, as_json: bool) -> None:
    """Update the cluster: every host, one after another, then the platform's apps.

    The release is brought to all hosts and verified there before the first one changes. Jobs go on while their host's
    daemon is replaced. The first failure ends it: that host serves with what it had, and so do those after it. Running
    it again goes on where it ended.
    """
    repository = repository or setting(config_dir() / "repository.txt")
    if not repository:
        raise click.UsageError(f"which repository? Give -r, or write it to {config_dir()}/repository.txt")
    with _alone():
        wanted = await asyncio.to_thread(_wanted, repository, version, channel)
        program = ""
        if not apps_only:
            program = await _update_hosts(repository, wanted, as_json)
        if hosts_only:
            return
    if program and wanted != VERSION:
        # What is to be deployed how, the new version knows.
        arguments = [program, "update", "--apps-only", "-r", repository, "--version", wanted]
        sys.stderr.flush()
        os.execv(program, arguments + ["--json"] * as_json)
    from flynn.bootstrap.update import update_apps

    images = config_dir() / f"images.{wanted}.json"
    failure = await update_apps(state_dir(), config_dir(), images, lambda app, done: _say(as_json, app, "app", done))
    if failure:
        if as_json:
            click.echo(encode({"step": "error", "error": failure}))
        raise click.ClickException(failure)


async def _update_hosts(repository: str, wanted: str, as_json: bool) -> str:
    """Update all hosts, this machine's last; returns the path of the new program here."""
    from flynn.host.rollout import Member, Rollout, RolloutFailed

    async with all_hosts() as hosts:
        own, *others = [Member(host.id, host.client) for host in hosts]
        rollout = Rollout(
            [*others, own], repository, wanted, lambda host, step, facts: _say(as_json, host, step, facts)
        )
        try:
            await rollout.run()
        except RolloutFailed as error:
            if as_json:
                click.echo(encode({"step": "error", "error": str(error)}))
            raise click.ClickException(str(error)) from error
        return rollout.programs[own.id]


def _say(as_json: bool, who: str, step: str, facts: dict[str, Any]) -> None:
    if as_json:
        click.echo(encode({"host" if step != "app" else "app": who, "step": step, **facts}))
    else:
        click.echo(f"{who}: {WORDS[step].format(**facts) if step in WORDS else facts['done']}", err=True)


def _wanted(repository: str, version: str, channel: str) -> str:
    """Return the version to update to, as the repository's signed metadata say."""
    from flynn.host.download.errors import DownloadFailed
    from flynn.host.download.pull import wanted_version
    from flynn.host.download.trust import ROOT_FILE, TrustedRepository

    try:
        source = TrustedRepository(repository, state_dir() / "tuf", roots=(config_dir() / ROOT_FILE,))
        try:
            return wanted_version(source, version=version, channel=channel or setting(config_dir() / "channel.txt"))
        finally:
            source.cut()
    except DownloadFailed as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Two updates at a time would each wait for hosts that the other one restarts."""
    path = Path(state_dir()) / "update.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise click.ClickException("another update is going on") from error
        yield
    finally:
        os.close(descriptor)
