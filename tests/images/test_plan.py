"""Which layers are made again after which change, and what the artifacts say."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from flynn.images.plan import InputFile, Inputs, Plan, artifact, built_layer, manifest, plan
from flynn.images.recipe import RecipeError, Recipes, recipes

LAYERS = {
    "debian": "{kind: debian, suite: bookworm, packages: [python3]}",
    "git": "{kind: packages, apt: [git]}",
    "db": "{kind: packages, apt: [db], run: 'echo\\nmade'}",
    "npm": "{kind: staged, tools: [npm], run: npm install, keep: [/usr/local]}",
    "python": "{kind: python, tools: [gcc], extras: [node]}",
    "machine": "kind: machine",
    "builder": "{kind: files, copy: {buildpacks: /builder}}",
    "code": "kind: code",
}
IMAGES = {
    "web": "{layers: [debian, python, code], entrypoint: {args: [flynn-web]}}",
    "git": "{layers: [debian, git, python, code]}",
    "stack": "{layers: [debian, git, db, npm, builder, python, machine, code], entrypoint: {env: {A: b}}}",
}
INPUTS = Inputs(
    files={"code": (InputFile("flynn/a.py", 1, "aa"),), "builder": (InputFile("buildpacks/x", 1, "bb", True),)},
    requirements=("aiohttp", "click"),
    scripts={"flynn-web": "flynn.web:main"},
    machine="m1",
    entrypoint_env={"PIP_CERT": "/ca"},
)


def known(**changed: str) -> Recipes:
    return recipes(IMAGES, LAYERS | changed)


def ids(plan: Plan) -> dict[str, list[str]]:
    """Layer ids by layer name."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        found.setdefault(layer.recipe.name, []).append(layer.id)
    return found


def test_images_share_the_layers_they_have_in_common() -> None:
    found = ids(plan(known(), [], INPUTS))
    assert {name: len(layers) for name, layers in found.items()} == dict.fromkeys(LAYERS, 1)


def test_every_layer_comes_after_those_it_is_built_on() -> None:
    seen: set[str] = set()
    for layer in plan(known(), ["stack", "web"], INPUTS).layers:
        assert set(layer.below) <= seen
        seen.add(layer.id)


def test_packages_are_built_on_the_system_layers_below_and_the_rest_on_debian_alone() -> None:
    planned = plan(known(), ["stack"], INPUTS)
    names = {layer.id: layer.recipe.name for layer in planned.layers}
    assert {layer.recipe.name: [names[id_] for id_ in layer.below] for layer in planned.layers} == {
        "debian": [],
        "git": ["debian"],
        "db": ["debian", "git"],
        "npm": ["debian", "git", "db"],
        "builder": [],
        "python": ["debian"],
        "machine": [],
        "code": ["debian"],
    }


def changed_layers(recipes: Recipes, inputs: Inputs) -> set[str]:
    before, after = ids(plan(known(), [], INPUTS)), ids(plan(recipes, [], inputs))
    return {name for name in before if before[name] != after[name]}


def with_inputs(**changes: Any) -> Inputs:
    fields: Mapping[str, Any] = {name: getattr(INPUTS, name) for name in Inputs.__dataclass_fields__}
    return Inputs(**{**fields, **changes})


@pytest.mark.parametrize(
    ("recipes", "inputs", "again"),
    [
        pytest.param(known(), INPUTS, set(), id="nothing"),
        pytest.param(
            known(),
            with_inputs(files=dict(INPUTS.files) | {"code": (InputFile("flynn/a.py", 1, "ab"),)}),
            {"code"},
            id="a line of code",
        ),
        pytest.param(
            known(),
            with_inputs(files=dict(INPUTS.files) | {"builder": (InputFile("buildpacks/x", 1, "bb", False),)}),
            {"builder"},
            id="a file's mode",
        ),
        pytest.param(known(), with_inputs(scripts={}), {"code"}, id="a console script"),
        pytest.param(known(), with_inputs(requirements=("aiohttp",)), {"python"}, id="a dependency"),
        pytest.param(known(), with_inputs(requirements=("click", "aiohttp")), set(), id="order of dependencies"),
        pytest.param(known(), with_inputs(machine="m2"), {"machine"}, id="the machine's mirrors"),
        pytest.param(
            known(git="{kind: packages, apt: [git, less]}"), INPUTS, {"git", "db", "npm"}, id="packages below"
        ),
        pytest.param(
            known(debian="{kind: debian, suite: trixie}"),
            INPUTS,
            {"debian", "git", "db", "npm", "python", "code"},
            id="the release of Debian",
        ),
    ],
)
def test_a_change_makes_exactly_the_layers_it_touches_again(recipes: Recipes, inputs: Inputs, again: set[str]) -> None:
    assert changed_layers(recipes, inputs) == again


def test_an_unknown_image_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="no image is called 'wbe'; there are git, stack, web"):
        plan(known(), ["wbe"], INPUTS)


def test_artifact_of_an_image() -> None:
    (image,) = plan(known(), ["web"], INPUTS).images
    built = {id_: built_layer(id_, 4096, f"sha-{id_}") for id_ in image.layers}
    content = manifest(image, built)
    found = artifact(image, content, "/cache")
    assert [layer.id for layer in content.layers()] == list(image.layers)
    assert content.entrypoints["_default"].args == ["flynn-web"]
    assert found.type == "flynn"
    assert found.uri == f"file:///cache/images/{content.id()}.json"
    assert found.hashes == {"sha512_256": content.id()}
    assert found.size == len(content.canonical())
    assert found.meta == {"flynn.component": "web", "flynn.system-image": "true"}
    assert found.layer_url(content.layers()[0]) == f"file:///cache/layers/{image.layers[0]}.squashfs"
    assert found.image() == content
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def test_only_images_with_a_machine_layer_get_the_machine_s_environment() -> None:
    web, stack = plan(known(), ["web", "stack"], INPUTS).images
    assert "PIP_CERT" not in web.env
    assert stack.env == {"PATH": web.env["PATH"], "PIP_CERT": "/ca", "A": "b"}
