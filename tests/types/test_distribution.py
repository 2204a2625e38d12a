"""Versions of releases and names of their files."""

from datetime import date

import pytest

from flynn.types.distribution import (
    ReleaseVersion,
    is_channel_name,
    next_version,
    release_version,
    released_versions,
    resolved,
    target_of,
)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("v20161114.0", ReleaseVersion("20161114", 0)),
        ("v20161114.12", ReleaseVersion("20161114", 12)),
        ("v20161114.0p1", ReleaseVersion("20161114", 0)),
        ("v20161114.3-abc", ReleaseVersion("20161114", 0)),
        ("v20161114.", None),
        ("v2016111.0", None),
        ("20161114.0", None),
        ("dev", None),
        ("", None),
    ],
)
def test_versions_are_read_as_the_original_reads_them(text: str, version: ReleaseVersion | None) -> None:
    assert release_version(text) == version


def test_versions_are_ordered_by_day_then_by_number_not_by_text() -> None:
    texts = ["v20260102.0", "v20260101.10", "v20260101.9", "v20251231.99"]
    assert sorted(texts, key=lambda text: release_version(text) or pytest.fail(text)) == texts[::-1]


@pytest.mark.parametrize(
    ("released", "following"),
    [
        ([], "v20260725.0"),
        (["v20260724.7"], "v20260725.0"),
        (["v20260725.9", "v20260725.10", "dev"], "v20260725.11"),
    ],
)
def test_the_next_version_counts_on_within_a_day(released: list[str], following: str) -> None:
    assert str(next_version(released, date(2026, 7, 25))) == following


def test_the_released_versions_are_those_with_images() -> None:
    assert released_versions(["v20260725.0/images.json.gz", "layers/x.squashfs", "channels/stable"]) == ["v20260725.0"]


@pytest.mark.parametrize(
    ("url", "split"),
    [
        ("https://dl.example.org/tuf?target=/layers/a.squashfs", ("https://dl.example.org/tuf", "layers/a.squashfs")),
        ("file:///srv/tuf?name=x&target=/images/a.json", ("file:///srv/tuf", "images/a.json")),
        ("file:///var/cache/flynn/layers/a.squashfs", None),
        ("https://blobstore.discoverd/a?expires=1&signature=2", None),
    ],
)
def test_addresses_of_files_in_a_repository(url: str, split: tuple[str, str] | None) -> None:
    assert target_of(url) == split


def test_references_are_resolved_and_addresses_are_left_alone() -> None:
    assert resolved("?target=/a", "https://x/tuf/") == "https://x/tuf?target=/a"
    assert resolved("https://y/a", "https://x/tuf") == "https://y/a"


@pytest.mark.parametrize(("name", "good"), [("stable", True), ("nightly-2", True), ("../x", False), ("", False)])
def test_channels_have_plain_names(name: str, good: bool) -> None:
    assert is_channel_name(name) is good
