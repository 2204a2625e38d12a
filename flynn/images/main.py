"""`flynn-images`: build the platform's images."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flynn.images import build as building
from flynn.images.layers import FilesChanged, LayerError
from flynn.images.recipe import RecipeError
from flynn.images.workshop import StepFailed


@click.group()
def main() -> None:
    """Build the platform's images from the recipes in images/."""


@main.command()
@click.argument("names", nargs=-1)
@click.option(
    "--repository", type=click.Path(path_type=Path, file_okay=False, exists=True), default=".", show_default=True
)
@click.option("--cache", type=click.Path(path_type=Path), default="/var/cache/flynn", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="build/images", show_default=True)
def build(names: tuple[str, ...], repository: Path, cache: Path, out: Path) -> None:
    """Build the named images, or all of them; what the cache holds is not made again."""
    try:
        building.build(repository.absolute(), names, cache=cache, out=out, say=lambda line: click.echo(line, err=True))
    except (RecipeError, LayerError, FilesChanged, StepFailed) as error:
        click.echo(f"flynn-images: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
