"""Recipes: what can be written, and what is refused with the place named."""

from pathlib import Path

import pytest

from flynn.images.recipe import Code, Debian, Packages, RecipeError, parse_image, parse_layer, read, recipes

DEBIAN = "{kind: debian, suite: bookworm, packages: [python3]}"


def test_a_layer_is_of_the_kind_it_names() -> None:
    assert parse_layer("debian", DEBIAN) == Debian(name="debian", suite="bookworm", packages=["python3"])
    assert parse_layer("git", "{kind: packages, apt: [git]}") == Packages(name="git", apt=["git"])
    assert parse_layer("code", "kind: code") == Code(name="code")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("{kind: stone}", "images/layers/x.yaml: Invalid value 'stone'", id="unknown kind"),
        pytest.param("{kind: packages, apt: git}", "Expected `array`, got `str` - at `$.apt`", id="wrong type"),
        pytest.param("{kind: packages, atp: [git]}", "unknown field `atp`", id="misspelt key"),
        pytest.param("{kind: debian}", "missing required field `suite`", id="missing key"),
        pytest.param("kind: [", "images/layers/x.yaml: while parsing", id="not YAML"),
    ],
)
def test_a_bad_layer_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_layer("x", text)
    assert complaint in str(refused.value)


def test_an_image_names_layers_and_entrypoint() -> None:
    image = parse_image("web", "{layers: [debian, code], entrypoint: {args: [flynn-web], uid: 5}}")
    assert (image.name, image.layers, image.entrypoint.args, image.entrypoint.uid) == (
        "web",
        ["debian", "code"],
        ["flynn-web"],
        5,
    )


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        pytest.param("layers: [debian, soup]", "layer 'soup' is not defined", id="unknown layer"),
        pytest.param("layers: [code, debian]", "the first layer must be of kind debian", id="no Debian below"),
        pytest.param("layers: []", "the first layer must be of kind debian", id="no layer at all"),
    ],
)
def test_an_image_that_does_not_fit_its_layers_is_refused(image: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipes({"web": image}, {"debian": DEBIAN, "code": "kind: code"})
    assert complaint in str(refused.value)


def test_the_recipes_of_the_platform_fit_together() -> None:
    known = read(Path(__file__).parents[2] / "images")
    assert {"base", "controller", "postgres", "slugbuilder", "slugrunner"} <= known.images.keys()
    unused = known.layers.keys() - {layer for image in known.images.values() for layer in image.layers}
    assert not unused
