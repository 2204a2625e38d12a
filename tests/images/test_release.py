"""Releases: what is published, with which keys, and what is refused."""

from __future__ import annotations

import gzip
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tuf.api.metadata import Metadata

from flynn.images.keys import KeyProblem, KeyRing, kept_out_of
from flynn.images.main import main
from flynn.images.release import ReleaseProblem
from flynn.images.repository import RepositoryProblem, RootPolicy
from flynn.types.artifact import Artifact
from flynn.types.codec import decode
from tests.publisher import Publisher, newest, target_file


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.build()
    return made


def _signed(publisher: Publisher, role: str) -> Any:
    return Metadata.from_bytes(newest(publisher.out, role).read_bytes()).signed


def test_a_release_has_images_manifests_layers_and_a_channel(publisher: Publisher) -> None:
    published = publisher.release("v20260725.3")

    targets = _signed(publisher, "targets").targets
    ids = [artifact.hashes["sha512_256"] for artifact in _images(publisher, "v20260725.3").values()]
    assert set(targets) == {
        "v20260725.3/images.json.gz",
        "channels/stable",
        "layers/base.squashfs",
        "layers/code-code.squashfs",
        *(f"images/{id_}.json" for id_ in ids),
    }
    assert target_file(publisher.out, "channels/*.stable").read_text() == "v20260725.3"
    assert target_file(publisher.out, "layers/*.base.squashfs").read_bytes() == b"debian" * 1000
    assert published.files == len(targets)


def test_artifacts_do_not_know_where_the_repository_is(publisher: Publisher) -> None:
    publisher.release("v20260725.0")
    router = _images(publisher, "v20260725.0")["router"]
    assert router.layer_url_template == "?target=/layers/{id}.squashfs"
    assert router.uri == f"?name=router&target=/images/{router.hashes['sha512_256']}.json"


def test_a_second_release_of_the_same_layers_adds_its_list_and_nothing_twice(publisher: Publisher) -> None:
    first = publisher.release()
    before = publisher.files()
    second = publisher.release()
    added = {file for file in publisher.files() - before if file.startswith("targets/")}
    assert (first.version, second.version) == tuple(f"v{publisher.now:%Y%m%d}.{n}" for n in (0, 1))
    assert {file.rpartition(".")[0].partition("/")[2].split("/")[0] for file in added} == {second.version, "channels"}
    assert second.files == 2


def test_a_changed_layer_is_all_a_third_release_adds(publisher: Publisher) -> None:
    publisher.release()
    publisher.build(b"new")
    assert publisher.release().files == 4  # the list, the channel, one manifest, one layer


def test_another_channel_leaves_stable_where_it_is(publisher: Publisher) -> None:
    publisher.release("v20260725.0")
    publisher.release("v20260725.1", channel="nightly")
    assert target_file(publisher.out, "channels/*.stable").read_text() == "v20260725.0"
    assert target_file(publisher.out, "channels/*.nightly").read_text() == "v20260725.1"


@pytest.mark.parametrize(
    ("version", "channel", "complaint"),
    [
        ("dev", "stable", "vYYYYMMDD.N"),
        ("v20260725.0", "../x", "channel"),
        ("v20260725.1", "stable", "released already"),
    ],
)
def test_what_is_no_release(publisher: Publisher, version: str, channel: str, complaint: str) -> None:
    publisher.release("v20260725.1")
    with pytest.raises(ReleaseProblem, match=complaint):
        publisher.release(version, channel)


def test_a_layer_that_changed_in_the_cache_is_not_signed(publisher: Publisher) -> None:
    publisher.store.squashfs("base").write_bytes(b"DEBIAN" * 1000)
    with pytest.raises(ReleaseProblem, match="its content has changed"):
        publisher.release()


def test_a_manifest_that_is_not_what_its_hash_says_is_not_signed(publisher: Publisher) -> None:
    file = publisher.images / "router.json"
    file.write_bytes(file.read_bytes().replace(b"amd64", b"arm64"))
    with pytest.raises(ReleaseProblem, match="the manifest is not the one its hash names"):
        publisher.release()


def test_a_layer_built_again_with_other_bytes_does_not_replace_the_released_one(publisher: Publisher) -> None:
    """Ids hash recipes, so a cache that was emptied gives one id a second content; hosts would refuse it."""
    publisher.release()
    publisher.image("controller", [publisher.layer("base", b"debian, a day later")])
    (publisher.images / "router.json").unlink()
    with pytest.raises(ReleaseProblem, match="has been released with other content"):
        publisher.release()


# Keys


def test_keys_are_made_once_for_their_owner_only_and_apart(publisher: Publisher) -> None:
    publisher.release()
    keys = {file.name.split(".")[0]: file for file in (publisher.home / "keys").rglob("*.pem")}
    assert {role: file.parent.name for role, file in keys.items()} == {
        "root": "offline",
        "targets": "offline",
        "snapshot": "online",
        "timestamp": "online",
    }
    assert {file.stat().st_mode & 0o777 for file in keys.values()} == {0o600}
    assert {file.parent.stat().st_mode & 0o777 for file in keys.values()} == {0o700}
    publisher.release()
    assert set(keys.values()) == set((publisher.home / "keys").rglob("*.pem"))


def test_a_key_others_can_read_signs_nothing(publisher: Publisher) -> None:
    publisher.release()
    next((publisher.home / "keys/online").glob("timestamp.*")).chmod(0o644)
    with pytest.raises(KeyProblem, match="can be read by others"):
        publisher.renew()


def test_offline_keys_may_have_a_passphrase(publisher: Publisher) -> None:
    offline, online = publisher.ring.offline, publisher.ring.online
    publisher.protect("correct horse")
    publisher.release()
    assert all("ENCRYPTED" in file.read_text() for file in offline.glob("*.pem"))
    assert not any("ENCRYPTED" in file.read_text() for file in online.glob("*.pem"))
    publisher.rotate("targets")
    publisher.release()
    for wrong in ("", "incorrect horse"):
        publisher.protect(wrong)
        publisher.renew()  # needs the online keys only
        with pytest.raises(KeyProblem, match="cannot read the key"):
            publisher.release()


@pytest.mark.parametrize("where", ["repository/keys", "sources/keys"])
def test_keys_stay_out_of_what_is_published(tmp_path: Path, where: str) -> None:
    ring = KeyRing(tmp_path / where, tmp_path / "online")
    with pytest.raises(KeyProblem, match="is published"):
        kept_out_of(ring, [tmp_path / "repository", tmp_path / "sources"])


def test_timestamps_are_signed_without_the_offline_keys(publisher: Publisher) -> None:
    publisher.release()
    (publisher.home / "keys/offline").rename(publisher.home / "vault")
    publisher.now += timedelta(days=5)
    assert publisher.renew(within=timedelta(days=3)) == ["timestamp"]
    publisher.now += timedelta(days=24)
    assert publisher.renew(within=timedelta(days=3)) == ["snapshot", "timestamp"]
    publisher.now += timedelta(days=400)
    with pytest.raises(KeyProblem, match=r"cannot sign root: 0 of the keys .* 1 are needed"):
        publisher.renew()


def test_releases_need_the_offline_keys_and_new_ones_are_not_made_up(publisher: Publisher) -> None:
    publisher.release()
    (publisher.home / "keys/offline").rename(publisher.home / "vault")
    with pytest.raises(KeyProblem, match="cannot sign targets"):
        publisher.release()
    assert not (publisher.home / "keys/offline").exists()


def test_two_of_three_root_keys_sign_and_one_does_not(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, policy=RootPolicy(keys=3, threshold=2))
    publisher.build()
    publisher.release()
    keys = sorted((tmp_path / "keys/offline").glob("root.*"))
    assert len(keys) == 3
    keys[0].unlink()
    publisher.now += timedelta(days=364)
    assert "root" in publisher.renew(within=timedelta(days=3))
    keys[1].unlink()
    with pytest.raises(KeyProblem, match=r"1 of the keys .* 2 are needed"):
        publisher.rotate("root")


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_rotated_keys_sign_what_comes_after(publisher: Publisher, role: str) -> None:
    publisher.release()
    before = set(_signed(publisher, "root").roles[role].keyids)
    publisher.rotate(role)
    after = set(_signed(publisher, "root").roles[role].keyids)
    assert len(after) == 1 and not before & after
    publisher.release()
    assert _signed(publisher, "root").version == 2


# Crashes


@pytest.mark.parametrize("lost", ["timestamp", "snapshot"])
def test_a_publication_that_broke_off_is_done_again(publisher: Publisher, lost: str) -> None:
    """The new timestamp comes last: without it, what was written before does not count."""
    publisher.release("v20260725.0")
    timestamp = publisher.out / "metadata/timestamp.json"
    before = timestamp.read_bytes()
    publisher.release("v20260725.1")
    timestamp.write_bytes(before)
    if lost == "snapshot":
        newest(publisher.out, "snapshot").unlink()
    publisher.release("v20260725.1")
    assert "v20260725.1/images.json.gz" in _signed(publisher, "targets").targets
    assert _signed(publisher, "targets").version == 3


def test_a_repository_that_lost_its_timestamp_is_not_begun_anew(publisher: Publisher) -> None:
    publisher.release()
    (publisher.out / "metadata/timestamp.json").unlink()
    with pytest.raises(RepositoryProblem, match="is missing"):
        publisher.release()


# The command


def test_the_command_releases_signs_and_rotates(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(publisher.home)
    keys = [f"--offline-keys={publisher.ring.offline}", f"--online-keys={publisher.ring.online}", "--out=repository"]
    built = [f"--images={publisher.images}", f"--cache={publisher.store.root}"]
    run = CliRunner().invoke

    released = run(main, ["release", *keys, *built, "--version=v20260725.0", "--timestamp-days=40"])
    assert released.exit_code == 0, released.output
    assert released.stdout.endswith("v20260725.0\n")
    assert "hosts trust it by" in released.output
    assert run(main, ["sign", *keys]).output == "signed timestamp\n"
    assert run(main, ["rotate", *keys, "root"]).output == "root has new keys\n"
    again = run(main, ["release", *keys, *built, "--version=v20260725.0"])
    assert (again.exit_code, again.output) == (1, "flynn-images: v20260725.0 has been released already\n")
    assert oct(os.stat(publisher.root).st_mode & 0o777) == "0o644"


def _images(publisher: Publisher, version: str) -> dict[str, Artifact]:
    content = target_file(publisher.out, f"{version}/*.images.json.gz").read_bytes()
    return decode(gzip.decompress(content), dict[str, Artifact])
