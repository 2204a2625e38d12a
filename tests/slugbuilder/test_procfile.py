"""Process types: Procfiles and releases of buildpacks."""

from __future__ import annotations

import pytest

from flynn.slugbuilder.procfile import Malformed, Release, parse_procfile, parse_release, process_commands


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        pytest.param("web: node server.js\n", {"web": "node server.js"}, id="one type"),
        pytest.param("b: 1\na: 2\n", {"b": "1", "a": "2"}, id="in the order of the file"),
        pytest.param("# no\n\n---\nweb:  x  # y\r\n", {"web": "x  # y"}, id="comments, blank lines, Windows"),
        pytest.param("web: foo: bar\n", {"web": "foo: bar"}, id="a colon in the command"),
        pytest.param("web:\tx\n", {"web": "x"}, id="a tab"),
        pytest.param('web: "x y"\n', {"web": "x y"}, id="quoted as a whole"),
        pytest.param('web: "x" && "y"\n', {"web": '"x" && "y"'}, id="quotes of the shell stay"),
        pytest.param("", {}, id="empty"),
        pytest.param("\ufeffweb: x", {"web": "x"}, id="byte order mark, no last newline"),
    ],
)
def test_procfiles(text: str, commands: dict[str, str]) -> None:
    parsed = parse_procfile(text)
    assert parsed == commands
    assert list(parsed) == list(commands)


@pytest.mark.parametrize("text", ["web", "web x: y", "- web: x", ": x", "web:", "wéb: x"])
def test_what_is_no_procfile_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(Malformed, match="line 2"):
        parse_procfile("ok: x\n" + text)


@pytest.mark.parametrize(
    ("text", "release"),
    [
        pytest.param("", Release(), id="nothing"),
        pytest.param("--- {}\n", Release(), id="an empty mapping"),
        pytest.param(
            "---\naddons:\n  - x\nconfig_vars:\n  A: 'it''s'\n  B: \"x\\ny\"\n"
            "default_process_types:\n  web: npm start # c\n",
            Release({"A": "it's", "B": "x\ny"}, {"web": "npm start"}),
            id="as documented",
        ),
        pytest.param('default_process_types: {"web": "x: y"}', Release({}, {"web": "x: y"}), id="as JSON"),
        pytest.param("default_process_types: ~", Release(), id="null"),
        pytest.param("default_process_types:\n  web: a: b c\n", Release({}, {"web": "a: b c"}), id="a colon"),
    ],
)
def test_releases(text: str, release: Release) -> None:
    assert parse_release(text) == release


@pytest.mark.parametrize("text", ["default_process_types: web", "config_vars:\n  - x\n"])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        parse_release(text)


def test_a_procfile_outranks_the_buildpack_and_types_are_sorted() -> None:
    assert list(process_commands({"web": "mine", "a": "1"}, {"web": "theirs", "b": "2"}).items()) == [
        ("a", "1"),
        ("b", "2"),
        ("web", "mine"),
    ]
