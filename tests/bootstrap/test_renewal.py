"""Which apps an update touches, and what their new releases are."""

from __future__ import annotations

import pytest

from flynn.bootstrap.renewal import in_order, renewed
from flynn.types.app import App
from flynn.types.artifact import Artifact
from flynn.types.release import Release


def image(name: str, content: str, id: str = "") -> Artifact:
    return Artifact(id=id, meta={"flynn.component": name} if name else {}, hashes={"sha512_256": content})


NEW = {
    "router": image("router", "r2", "a-router"),
    "gitreceive": image("gitreceive", "g1", "a-gitreceive"),
    "slugrunner": image("slugrunner", "s2", "a-runner"),
    "slugbuilder": image("slugbuilder", "b2", "a-builder"),
}
BUILD = {"SLUGBUILDER_18_IMAGE_ID": "old", "SLUGRUNNER_18_IMAGE_ID": "old", "KEY": "kept"}


@pytest.mark.parametrize(
    ("base", "system", "artifacts", "env", "wanted"),
    [
        pytest.param(image("router", "r1"), True, ["x"], {}, (["a-router"], {}), id="a system app gets its image"),
        pytest.param(image("router", "r2"), True, ["x"], {}, None, id="the same content is left alone"),
        pytest.param(
            image("slugrunner", "s1"), False, ["x", "slug"], {"SLUGRUNNER_18_IMAGE_ID": "mine"},
            (["a-runner", "slug"], {"SLUGRUNNER_18_IMAGE_ID": "mine"}), id="a pushed app keeps slug and environment",
        ),
        pytest.param(image("", "d1"), False, ["x"], {}, None, id="an app from a Docker image is its owner's"),
        pytest.param(image("router", "r1"), False, ["x"], {}, None, id="a user's app on a system image, too"),
        pytest.param(image("mongodb", "m1"), True, ["x"], {}, None, id="no image in the release: left as it is"),
        pytest.param(
            image("gitreceive", "g1"), True, ["x"], BUILD,
            (["x"], {"SLUGBUILDER_18_IMAGE_ID": "a-builder", "SLUGRUNNER_18_IMAGE_ID": "a-runner", "KEY": "kept"}),
            id="who names images gets their new names",
        ),
    ],
)  # fmt: skip
def test_a_release_is_renewed(
    base: Artifact,
    system: bool,
    artifacts: list[str],
    env: dict[str, str],
    wanted: tuple[list[str], dict[str, str]] | None,
) -> None:
    found = renewed(Release(id="r", app_id="app", artifacts=artifacts, env=env), base, NEW, system=system)
    assert (found and (found.artifacts, found.env)) == wanted
    assert found is None or (found.id, found.app_id) == ("", "app")


def test_the_platform_comes_first_and_in_its_order() -> None:
    system = {"flynn-system-app": "true"}
    names = ["zebra", "status", "redis-77", "discoverd", "apple", "controller", "router"]
    apps = [App(name=name, meta={} if name in ("zebra", "apple") else system) for name in names]
    assert [app.name for app in in_order(apps)] == [
        "discoverd", "router", "controller", "status", "redis-77", "apple", "zebra",
    ]  # fmt: skip
