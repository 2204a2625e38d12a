"""What an image consists of, as written in `images/*.yaml` and `images/layers/*.yaml`.

An image names its layers from the bottom up and its entrypoint:

    layers: [debian, git, python, code]
    entrypoint: {args: [flynn-gitreceive]}

A layer is defined once in `images/layers/<name>.yaml` and shared by every image that names it. Its `kind` says how it
is made; the keys of each kind are the fields of the classes below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RecipeError(Exception):
    """A recipe that cannot be followed; the text names the file and the key."""


class _Layer(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    name: str = ""  # the file's name, filled in by `read`


class Debian(_Layer, frozen=True, tag="debian"):
    """A minimal Debian made by mmdebstrap: the bottom of every image."""

    suite: str
    packages: list[str] = []


class Packages(_Layer, frozen=True, tag="packages"):
    """Debian packages on top of the system layers below, then a script run by `bash -eu` in the same root."""

    apt: list[str] = []
    before: str = ""  # script that runs before the packages are installed
    run: str = ""  # script that runs after


class Staged(_Layer, frozen=True, tag="staged"):
    """What a script makes with tools that are not kept: only the trees in `keep` go into the layer."""

    tools: list[str]  # Debian packages, installed below the layer and thrown away with it
    run: str
    keep: list[str]


class Python(_Layer, frozen=True, tag="python"):
    """The dependencies of the `flynn` distribution, installed into a virtual environment of the image's own Python."""

    tools: list[str]  # Debian packages needed to compile wheels; thrown away
    extras: list[str] = []
    remove: list[str] = []  # globs below site-packages that no daemon needs


class Code(_Layer, frozen=True, tag="code"):
    """The `flynn` package itself with its console scripts. Always the last and smallest layer of an image."""


class Files(_Layer, frozen=True, tag="files"):
    """Files of this repository copied as they are, empty directories and symbolic links."""

    copy: dict[str, str] = {}  # path in the repository (file or tree) -> absolute path in the image
    links: dict[str, str] = {}  # absolute path in the image -> target
    directories: list[str] = []


class Machine(_Layer, frozen=True, tag="machine"):
    """The build machine's CA bundle and package index settings, for images in which users' builds run."""


LayerRecipe = Debian | Packages | Staged | Python | Code | Files | Machine


class EntrypointRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    args: list[str] = []
    cwd: str = ""
    env: dict[str, str] = {}
    uid: int | None = None
    gid: int | None = None


class ImageRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    layers: list[str]
    entrypoint: EntrypointRecipe = EntrypointRecipe()
    meta: dict[str, str] = {}


class Recipes(msgspec.Struct, frozen=True):
    images: dict[str, ImageRecipe]
    layers: dict[str, LayerRecipe]


def parse_image(name: str, text: str) -> ImageRecipe:
    recipe: ImageRecipe = _parse(f"images/{name}.yaml", text, ImageRecipe)
    return msgspec.structs.replace(recipe, name=name)


def parse_layer(name: str, text: str) -> LayerRecipe:
    recipe: LayerRecipe = _parse(f"images/layers/{name}.yaml", text, LayerRecipe)
    return msgspec.structs.replace(recipe, name=name)


def _parse(origin: str, text: str, wanted: Any) -> Any:
    try:
        return msgspec.convert(yaml.safe_load(text), wanted)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise RecipeError(f"{origin}: {error}") from error


def recipes(images: Mapping[str, str], layers: Mapping[str, str]) -> Recipes:
    """Parse all recipe texts and check that they fit together."""
    parsed_layers = {name: parse_layer(name, text) for name, text in layers.items()}
    parsed_images = {name: parse_image(name, text) for name, text in images.items()}
    for image in parsed_images.values():
        for name in image.layers:
            if name not in parsed_layers:
                raise RecipeError(f"images/{image.name}.yaml: layer {name!r} is not defined in images/layers")
        if not image.layers or not isinstance(parsed_layers[image.layers[0]], Debian):
            raise RecipeError(f"images/{image.name}.yaml: the first layer must be of kind debian")
    return Recipes(parsed_images, parsed_layers)


def read(directory: Path) -> Recipes:
    """Read all recipes below `directory` (the repository's `images/`)."""
    return recipes(
        {path.stem: path.read_text() for path in sorted(directory.glob("*.yaml"))},
        {path.stem: path.read_text() for path in sorted((directory / "layers").glob("*.yaml"))},
    )
