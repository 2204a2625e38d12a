"""Output, sizes, .slugignore: the small rules of a build."""

from __future__ import annotations

from pathlib import Path

import pytest

from flynn.slugbuilder.output import headline, human_size, indented
from flynn.slugbuilder.slugignore import matches, patterns, remove


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"-----> Node\n", b"\x1b[1G-----> Node\n"),
        (b"=====> Pack\n", b"\x1b[1G=====> Pack\n"),
        (b"plain \r\n", b"\x1b[1G       plain\n"),
        (b"       done already\n", b"\x1b[1G       done already\n"),
        (b"  tree", b"\x1b[1G         tree\n"),
        (b"back\\slash\n", b"\x1b[1G       back\\slash\n"),
        (b"\n", b"\x1b[1G       \n"),
    ],
)
def test_lines_of_buildpacks(line: bytes, shown: bytes) -> None:
    assert indented(line) == shown


def test_headlines() -> None:
    assert headline("Uploading") == b"\x1b[1G-----> Uploading\n"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (19314770, "18.42 MiB"), (5 << 30, "5 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


def test_slugignore_removes_what_the_globs_name_and_nothing_outside(tmp_path: Path) -> None:
    top = tmp_path / "app"
    for name in ("a.psd", "docs/x", "docs/y", "src/a.psd", "src/deep/b.tmp", "remove", "the", ".hidden", "with blank"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    (tmp_path / "outside").touch()
    (top / "link").symlink_to(tmp_path)
    text = "# remove the docs folder\n\n*.psd\n/docs/\n**/*.tmp\nwith blank\nlink/*\n../outside\n.hid*\nmissing\n"
    doomed = matches(top, patterns(text))
    assert [str(path.relative_to(top)) for path in doomed] == [
        ".hidden",
        "a.psd",
        "docs",
        "src/deep/b.tmp",
        "with blank",
    ]
    assert sum(remove(path) for path in doomed) == 6
    assert (tmp_path / "outside").exists()
    assert sorted(path.name for path in top.iterdir()) == ["link", "remove", "src", "the"]
