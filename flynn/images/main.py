"""`flynn-images`: build the platform's images, and publish them."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flynn.images import build as building
from flynn.images.layers import FilesChanged, LayerError
from flynn.images.machine import NOWHERE
from flynn.images.recipe import RecipeError
from flynn.images.workshop import StepFailed

if TYPE_CHECKING:
    from flynn.images.repository import SignedRepository


@click.group()
def main() -> None:
    """Build the platform's images from the recipes in images/, and publish them as signed releases."""


@main.command()
@click.argument("names", nargs=-1)
@click.option(
    "--repository", type=click.Path(path_type=Path, file_okay=False, exists=True), default=".", show_default=True
)
@click.option("--cache", type=click.Path(path_type=Path), default="/var/cache/flynn", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="build/images", show_default=True)
@click.option("--portable", is_flag=True, help="Images for users' builds carry no settings of this machine.")
def build(names: tuple[str, ...], repository: Path, cache: Path, out: Path, portable: bool) -> None:
    """Build the named images, or all of them; what the cache holds is not made again."""
    try:
        building.build(
            repository.absolute(),
            names,
            cache=cache,
            out=out,
            say=lambda line: click.echo(line, err=True),
            carried=NOWHERE if portable else None,
        )
    except (RecipeError, LayerError, FilesChanged, StepFailed) as error:
        click.echo(f"flynn-images: {error}", err=True)
        sys.exit(1)


def _signing(command: click.decorators.FC) -> click.decorators.FC:
    """The options of all commands that sign."""
    keys = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "flynn" / "release-keys"
    for option in (
        click.option("--out", type=click.Path(path_type=Path), default="build/release", show_default=True),
        click.option(
            "--offline-keys",
            type=click.Path(path_type=Path),
            default=keys / "offline",
            show_default=True,
            help="Of root and targets: on a medium that leaves the machine.",
        ),
        click.option(
            "--online-keys",
            type=click.Path(path_type=Path),
            default=keys / "online",
            show_default=True,
            help="Of snapshot and timestamp: where timestamps are signed daily.",
        ),
        click.option("--root-days", default=365, show_default=True),
        click.option("--targets-days", default=365, show_default=True),
        click.option("--snapshot-days", default=30, show_default=True),
        click.option("--timestamp-days", default=7, show_default=True),
    ):
        command = option(command)
    return command


@contextmanager
def _signed(out: Path, offline_keys: Path, online_keys: Path, days: dict[str, int]) -> Iterator[SignedRepository]:
    """The repository to sign; what is wrong with it or the keys ends the program."""
    from flynn.images.keys import KeyProblem, KeyRing, kept_out_of
    from flynn.images.release import ReleaseProblem
    from flynn.images.repository import Lifetimes, RepositoryProblem, SignedRepository

    # Not an option: command lines can be read by everybody on the machine.
    passphrase = os.environ.get("FLYNN_RELEASE_PASSPHRASE", "")
    ring = KeyRing(offline_keys.absolute(), online_keys.absolute(), passphrase)
    lifetimes = Lifetimes(**{role.removesuffix("_days"): timedelta(days=count) for role, count in days.items()})
    try:
        sources = [parent for parent in Path.cwd().parents if (parent / ".git").exists()]
        kept_out_of(ring, [out, *sources, *([Path.cwd()] if Path(".git").exists() else [])])
        yield SignedRepository(out.absolute(), ring, lifetimes=lifetimes)
    except (KeyProblem, RepositoryProblem, ReleaseProblem) as error:
        click.echo(f"flynn-images: {error}", err=True)
        sys.exit(1)


@main.command()
@_signing
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), default="build/images", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default="/var/cache/flynn", show_default=True)
@click.option("--channel", default="stable", show_default=True, help="Points at the release afterwards.")
@click.option("--version", default="", help="vYYYYMMDD.N. Default: the next of today.")
@click.option("--wheels", type=click.Path(path_type=Path, file_okay=False), help="flynn-host and all it needs.")
@click.option("--root-keys", default=1, show_default=True, help="Of a new repository.")
@click.option("--root-threshold", default=1, show_default=True, help="How many of them must sign.")
def release(
    out: Path,
    offline_keys: Path,
    online_keys: Path,
    images: Path,
    cache: Path,
    channel: str,
    version: str,
    wheels: Path | None,
    root_keys: int,
    root_threshold: int,
    **days: int,
) -> None:
    """Publish the built images in a signed repository. Keys are made at the first release."""
    from flynn.images import release as releasing
    from flynn.images.repository import RootPolicy
    from flynn.types.program import python_kind

    with _signed(out, offline_keys, online_keys, days) as repository:
        published = releasing.release(
            repository,
            images=images,
            cache=cache.absolute(),
            channel=channel,
            version=version,
            today=datetime.now(UTC).date(),
            policy=RootPolicy(root_keys, root_threshold),
            say=lambda line: click.echo(line, err=True),
            wheels=wheels,
            python=python_kind(sys.version_info.major, sys.version_info.minor, sysconfig.get_platform()),
        )
    new = f"{published.files} new files, {published.bytes / 1e6:.1f} MB"
    click.echo(f"{published.version} in {out}, channel {channel}: {new}", err=True)
    click.echo(published.version)


@main.command()
@_signing
@click.option("--within-days", default=3, show_default=True, help="Sign what expires within this time.")
def sign(out: Path, offline_keys: Path, online_keys: Path, within_days: int, **days: int) -> None:
    """Sign the timestamp and what else is about to expire, every day. Usually the online keys are enough."""
    with _signed(out, offline_keys, online_keys, days) as repository, repository.locked():
        signed = repository.renew(within=timedelta(days=within_days))
    click.echo(f"signed {', '.join(signed)}", err=True)


@main.command()
@_signing
@click.argument("role", type=click.Choice(["root", "targets", "snapshot", "timestamp"]))
def rotate(out: Path, offline_keys: Path, online_keys: Path, role: str, **days: int) -> None:
    """Replace the keys of a role: after a leak, or because their time has come. Hosts follow by themselves."""
    with _signed(out, offline_keys, online_keys, days) as repository, repository.locked():
        repository.rotate(role)
    click.echo(f"{role} has new keys", err=True)


if __name__ == "__main__":
    main()
