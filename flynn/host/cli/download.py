"""`download`: bring a signed release onto this machine."""

from __future__ import annotations

import os
from pathlib import Path

import click

from flynn.host.config import CONFIG_DIR, STATE_DIR
from flynn.types.codec import encode


@click.command()
@click.option("-r", "--repository", default="", envvar="FLYNN_REPOSITORY", help="A directory, http:// or https://.")
@click.option("--root", default="", help="The repository's root, to begin to trust it. Needed once.")
@click.option("--channel", default="", help="Take the version it points at. Default: channel.txt, else stable.")
@click.option("--version", default="", envvar="FLYNN_VERSION", help="vYYYYMMDD.N, instead of a channel.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@click.option("--state-dir", default=str(STATE_DIR), envvar="FLYNN_STATE_DIR", show_default=True)
@click.option("-c", "--config-dir", default=str(CONFIG_DIR), envvar="FLYNN_CONFIG_DIR", show_default=True)
def download(
    repository: str, root: str, channel: str, version: str, as_json: bool, state_dir: str, config_dir: str
) -> None:
    """Download the images of a release, verify them, and list them in images.VERSION.json for `bootstrap --images`.

    The repository is -r, else the content of repository.txt in the config directory. What it serves must be signed by
    the root this host trusts: --root, or tuf-root.json in the config directory, at the first time; afterwards what has
    followed from it. The daemon may run. What is here already is verified, not downloaded again.
    """
    from flynn.host.download.errors import DownloadFailed
    from flynn.host.download.pull import FETCHED, Places, Pulled, pull, wanted_version
    from flynn.host.download.trust import ROOT_FILE, TrustedRepository

    state, config = Path(state_dir).absolute(), Path(config_dir).absolute()
    repository = repository or setting(config / "repository.txt")
    if not repository:
        raise click.UsageError(f"which repository? Give -r, or write it to {config}/repository.txt")
    fetched: list[int] = []

    def tell(pulled: Pulled) -> None:
        if pulled.state == FETCHED:
            fetched.append(pulled.layer["length"])
        if as_json:
            click.echo(encode(pulled))
        elif pulled.state == FETCHED:
            click.echo(
                f"{pulled.name}: layer {pulled.layer['id'][:16]}, {pulled.layer['length'] / 1e6:.1f} MB", err=True
            )

    try:
        source = TrustedRepository(repository, state / "tuf", roots=(config / ROOT_FILE,))
        try:
            if root:
                source.trust(Path(root))
            wanted = wanted_version(source, version=version, channel=channel or setting(config / "channel.txt"))
            images = pull(source, wanted, Places(state / "layers", config), tell)
        finally:
            source.cut()
    except DownloadFailed as error:
        if as_json:
            click.echo(encode({"type": "error", "error": str(error)}))
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(encode({"type": "done", "version": wanted, "images": str(images), "bytes": sum(fetched)}))
    else:
        click.echo(f"{wanted} is here, {len(fetched)} layers fetched, {sum(fetched) / 1e6:.1f} MB", err=True)
        click.echo(str(images))


def setting(file: Path) -> str:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise click.ClickException(f"{file}: {os.strerror(error.errno or 0)}") from error
