"""From recipes to artifacts: gather the inputs, plan, make what the cache lacks, write the artifacts."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flynn.images import machine as machines
from flynn.images import recipe as recipes
from flynn.images.files import input_files
from flynn.images.layers import CA_IN_IMAGE, FilesChanged, Job, LayerError, tree_of
from flynn.images.machine import Machine
from flynn.images.plan import InputFile, Inputs, Plan, PlannedLayer, artifact, manifest, plan
from flynn.images.recipe import Code, Debian, Files, Packages, Python, Recipes, Staged
from flynn.images.store import Store, write_synced
from flynn.images.workshop import private_mounts, remove_tree
from flynn.types.artifact import Layer
from flynn.types.codec import encode_indented

# The code layer is made at every change and is small: packing it fast matters more than its size.
QUICK_LEVEL, THOROUGH_LEVEL = 3, 9
ATTEMPTS = 5  # somebody may be editing while the files are hashed and copied, which takes a tenth of a second


@dataclass(frozen=True, slots=True)
class Project:
    """What `pyproject.toml` says that images need."""

    version: str
    requirements: tuple[str, ...]
    scripts: dict[str, str]

    @classmethod
    def read(cls, path: Path, extras: Iterable[str]) -> Project:
        project = tomllib.loads(path.read_text())["project"]
        requirements = list(project["dependencies"])
        for extra in extras:
            requirements += project["optional-dependencies"][extra]
        return cls(project["version"], tuple(requirements), dict(project["scripts"]))


def build(
    repository: Path,
    names: Iterable[str],
    *,
    cache: Path,
    out: Path,
    say: Callable[[str], None],
    carried: Machine | None = None,
) -> None:
    """Build the named images (all if none is named) and write `out/<name>.json` for each.

    `carried` are the settings that images for users' builds get; `None` = those of this machine.

    Builds on one cache wait for each other. Needs root as soon as a layer has to be made.

    Raises:
        RecipeError, LayerError, StepFailed
        FilesChanged: the sources did not hold still during any of the attempts
    """
    known = recipes.read(repository / "images")
    machine = machines.find()
    carried = carried or machine
    project = Project.read(repository / "pyproject.toml", _extras(known))
    store = Store(cache.absolute())
    with store.locked():
        for attempt in range(1, ATTEMPTS + 1):
            planned = plan(known, names, _inputs(known, project, carried, repository))
            try:
                layers = _make_missing(planned, store, repository, project, machine, carried, say)
                break
            except FilesChanged as change:
                if attempt == ATTEMPTS:
                    raise
                say(f"{change}: planning again")
        out.mkdir(parents=True, exist_ok=True)
        for image in planned.images:
            content = manifest(image, layers)
            store.add_manifest(content.id(), content.canonical())
            write_synced(out / f"{image.recipe.name}.json", encode_indented(artifact(image, content, str(store.root))))
    say(f"{len(planned.images)} images of {len(planned.layers)} layers in {out}")


def _make_missing(
    planned: Plan,
    store: Store,
    repository: Path,
    project: Project,
    machine: Machine,
    carried: Machine,
    say: Callable[[str], None],
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    missing: list[PlannedLayer] = []
    for layer in planned.layers:
        built = store.find(layer.id)
        if built is None:
            missing.append(layer)
        else:
            layers[layer.id] = built
    if not missing:
        return layers
    if os.geteuid() != 0:
        raise LayerError(f"only root can build layers, and {missing[0].recipe.name} is not in the cache")
    private_mounts()
    work = store.root / "work"
    remove_tree(work)  # left by a build that was killed
    logs = store.root / "log"
    logs.mkdir(exist_ok=True)
    suites = {layer.id: layer.recipe.suite for layer in planned.layers if isinstance(layer.recipe, Debian)}
    try:
        for layer in missing:
            started = time.monotonic()
            say(f"layer {layer.recipe.name}: building ...")
            log = logs / f"{layer.recipe.name}.log"
            log.unlink(missing_ok=True)
            job = Job(
                files=layer.files,
                below=[store.squashfs(id_) for id_ in layer.below],
                work=work / "layer",
                log=log,
                downloads=work / "downloads",
                repository=repository,
                machine=machine,
                carried=carried,
                suite=suites[layer.below[0]] if layer.below else getattr(layer.recipe, "suite", ""),
                requirements=project.requirements,
                scripts=project.scripts,
                version=project.version,
            )
            with tree_of(layer.recipe, job) as tree:
                level = QUICK_LEVEL if isinstance(layer.recipe, Code | Files) else THOROUGH_LEVEL
                keep_times = isinstance(layer.recipe, Debian | Packages | Staged)
                layers[layer.id] = store.add(layer.id, tree, level, keep_times=keep_times)
            size = layers[layer.id].length / 1e6
            say(f"layer {layer.recipe.name}: {size:.1f} MB in {time.monotonic() - started:.1f} s")
    finally:
        remove_tree(work)
    return layers


def _extras(known: Recipes) -> list[str]:
    return sorted({extra for layer in known.layers.values() if isinstance(layer, Python) for extra in layer.extras})


def _inputs(known: Recipes, project: Project, carried: Machine, repository: Path) -> Inputs:
    files: dict[str, tuple[InputFile, ...]] = {}
    for layer in known.layers.values():
        match layer:
            case Code():
                files[layer.name] = tuple(input_files(repository / "flynn", "flynn"))
            case Files():
                files[layer.name] = tuple(
                    file for source in layer.copy for file in input_files(repository / source, source)
                )
            case _:
                pass
    return Inputs(
        files=files,
        requirements=project.requirements,
        scripts={**project.scripts, "version": project.version},
        machine=carried.fingerprint(),
        entrypoint_env=carried.environment(CA_IN_IMAGE),
    )
