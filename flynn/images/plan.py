"""Which layers a set of images needs, in which order, and what each is called. Pure.

The id of a layer is the SHA-512/256 of the canonical JSON of everything it is made from: its recipe, the ids of the
layers it is built on, and path, size and hash of each file that goes in. So a layer is made again exactly when one of
those changed, and two images that ask for the same thing share it.

A layer is built on the *system* layers below it (Debian and packages) only. The Python environment and the code are
built on Debian alone whatever lies between, therefore every image shares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flynn.images.recipe import (
    PATH,
    Code,
    Debian,
    Files,
    ImageRecipe,
    LayerRecipe,
    Machine,
    Packages,
    Python,
    RecipeError,
    Recipes,
    Staged,
)
from flynn.types.artifact import (
    DEFAULT_ENTRYPOINT,
    SQUASHFS_TYPE,
    Artifact,
    Entrypoint,
    ImageManifest,
    Layer,
    Platform,
    Rootfs,
)
from flynn.types.codec import canonical, sha512_256

BUILDER_VERSION = 1  # an input of every layer: raise it when the way layers are made changes


@dataclass(frozen=True, slots=True, order=True)
class InputFile:
    path: str
    size: int
    sha: str  # SHA-512/256, hex
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the layers are made from besides their recipes: gathered by the shell, judged here."""

    files: Mapping[str, tuple[InputFile, ...]] = field(default_factory=dict)  # layer name -> files that go in
    requirements: tuple[str, ...] = ()  # of the Python environment
    scripts: Mapping[str, str] = field(default_factory=dict)  # console script -> module:function
    machine: str = ""  # fingerprint of the machine's settings, for layers of kind machine
    entrypoint_env: Mapping[str, str] = field(default_factory=dict)  # what a machine layer adds to the entrypoint


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    id: str
    recipe: LayerRecipe
    below: tuple[str, ...]  # ids of the layers it is built on, bottom first
    files: tuple[InputFile, ...] = ()  # what goes in


@dataclass(frozen=True, slots=True)
class PlannedImage:
    recipe: ImageRecipe
    layers: tuple[str, ...]  # ids, bottom first
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    layers: tuple[PlannedLayer, ...]  # each after all it is built on
    images: tuple[PlannedImage, ...]


def plan(recipes: Recipes, wanted: Iterable[str], inputs: Inputs) -> Plan:
    """Plan the `wanted` images, or all of them if none is named.

    Raises:
        RecipeError: an image is unknown.
    """
    names = list(dict.fromkeys(wanted)) or sorted(recipes.images)
    layers: dict[str, PlannedLayer] = {}
    images: list[PlannedImage] = []
    for name in names:
        if name not in recipes.images:
            raise RecipeError(f"no image is called {name!r}; there are {', '.join(sorted(recipes.images))}")
        image = recipes.images[name]
        system: list[str] = []  # ids of the system layers so far
        ids: list[str] = []
        env = {"PATH": PATH}
        for layer_name in image.layers:
            recipe = recipes.layers[layer_name]
            below = _built_on(recipe, tuple(system))
            layer = PlannedLayer(layer_id(recipe, below, inputs), recipe, below, inputs.files.get(recipe.name, ()))
            layers.setdefault(layer.id, layer)
            ids.append(layer.id)
            if isinstance(recipe, Debian | Packages):
                system.append(layer.id)
            if isinstance(recipe, Machine):
                env |= inputs.entrypoint_env
        images.append(PlannedImage(image, tuple(ids), env | image.entrypoint.env))
    return Plan(tuple(layers.values()), tuple(images))


def _built_on(recipe: LayerRecipe, system: tuple[str, ...]) -> tuple[str, ...]:
    match recipe:
        case Packages() | Staged():
            return system
        case Python() | Code():
            return system[:1]
        case Debian() | Files() | Machine():
            return ()


def layer_id(recipe: LayerRecipe, below: tuple[str, ...], inputs: Inputs) -> str:
    document: dict[str, Any] = {
        "builder": BUILDER_VERSION,
        "recipe": _by_lines(msgspec.to_builtins(recipe)),
        "below": list(below),
        "files": [
            {"path": f.path, "size": f.size, "sha": f.sha, "executable": f.executable}
            for f in sorted(inputs.files.get(recipe.name, ()))
        ],
    }
    match recipe:
        case Python():
            document["requirements"] = sorted(inputs.requirements)
        case Code():
            document["scripts"] = dict(inputs.scripts)
        case Machine():
            document["machine"] = inputs.machine
        case _:
            pass
    return sha512_256(canonical(document))


def _by_lines(recipe: dict[str, Any]) -> dict[str, Any]:
    """Scripts as lists of lines: canonical JSON has no form for a line break."""
    return {k: v.replace("\t", "    ").splitlines() if isinstance(v, str) else v for k, v in recipe.items()}


def manifest(image: PlannedImage, layers: Mapping[str, Layer]) -> ImageManifest:
    """The manifest of an image whose layers have been built; `layers` maps ids to what came out."""
    entrypoint = image.recipe.entrypoint
    return ImageManifest(
        entrypoints={
            DEFAULT_ENTRYPOINT: Entrypoint(
                args=entrypoint.args,
                cwd=entrypoint.cwd,
                env=dict(image.env),
                uid=entrypoint.uid,
                gid=entrypoint.gid,
            )
        },
        rootfs=[
            Rootfs(
                platform=Platform(architecture="amd64", os="linux"),
                layers=[layers[id_] for id_ in image.layers],
            )
        ],
    )


def artifact(image: PlannedImage, manifest: ImageManifest, cache: str) -> Artifact:
    """The artifact under which a locally built image is known; `cache` is the absolute path of the cache directory.

    The URI contains the image id: the controller treats two artifacts of one URI as the same thing.
    """
    content = manifest.canonical()
    id_ = sha512_256(content)
    return Artifact(
        type="flynn",
        uri=f"file://{cache}/images/{id_}.json",
        meta={"flynn.component": image.recipe.name, "flynn.system-image": "true", **image.recipe.meta},
        manifest=manifest.document(),
        hashes={"sha512_256": id_},
        size=len(content),
        layer_url_template=f"file://{cache}/layers/{{id}}.squashfs",
    )


def built_layer(id_: str, length: int, sha: str) -> Layer:
    return Layer(id=id_, type=SQUASHFS_TYPE, length=length, hashes={"sha512_256": sha})
