"""What somebody who holds the server, the wire or some of the keys can try, and what the host answers.

Every case ends the same way: the attempt is refused with its reason, and the host has what it had before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from flynn.host.download.errors import DownloadFailed, NotReleased, NoTrust, Reason, Refused, Unavailable
from flynn.images.repository import HASH, RootPolicy
from tests.publisher import Publisher, edited, newest, sha256, signed_by, target_file

from .conftest import Host

Attack = Callable[[Publisher, Path], None]


@pytest.fixture
def mirror(publisher: Publisher, host: Host) -> Path:
    """A copy the attacker holds. The host knows the first release; the second one it has not seen yet."""
    host.download(publisher.out)
    publisher.build(b"second")
    publisher.release("v20260725.1")
    return publisher.copy("mirror")


def _strip_signatures(role: str) -> Attack:
    def attack(publisher: Publisher, mirror: Path) -> None:
        file = mirror / "metadata/timestamp.json" if role == "timestamp" else newest(mirror, role)
        thief = Publisher(publisher.home / "thief")
        thief.build()
        thief.release()
        signed_by(thief, role, file)

    return attack


def _swap_snapshot(publisher: Publisher, mirror: Path) -> None:
    """The files of two states, each signed: mix and match."""
    publisher.build(b"third")
    publisher.release("v20260725.2")
    shutil.copyfile(newest(publisher.out, "snapshot"), newest(mirror, "snapshot"))


def _swap_targets(publisher: Publisher, mirror: Path) -> None:
    publisher.build(b"third")
    publisher.release("v20260725.2")
    shutil.copyfile(newest(publisher.out, "targets"), newest(mirror, "targets"))


def _old_targets_under_the_new_name(publisher: Publisher, mirror: Path) -> None:
    shutil.copyfile(mirror / "metadata/2.targets.json", newest(mirror, "targets"))


def _other_layer(publisher: Publisher, mirror: Path) -> None:
    file = target_file(mirror, "layers/*.code-second.squashfs")
    file.write_bytes(b"S" * file.stat().st_size)


def _longer_layer(publisher: Publisher, mirror: Path) -> None:
    with target_file(mirror, "layers/*.code-second.squashfs").open("ab") as file:
        file.write(b"and more" * 1000)


def _shorter_layer(publisher: Publisher, mirror: Path) -> None:
    file = target_file(mirror, "layers/*.code-second.squashfs")
    file.write_bytes(file.read_bytes()[:-1])


def _endless_metadata(publisher: Publisher, mirror: Path) -> None:
    with (mirror / "metadata/timestamp.json").open("ab") as file:
        file.truncate(100_000_000)


def _other_images(publisher: Publisher, mirror: Path) -> None:
    file = target_file(mirror, "v20260725.1/*.images.json.gz")
    file.write_bytes(target_file(mirror, "v20260725.0/*.images.json.gz").read_bytes())


def _more_targets(publisher: Publisher, mirror: Path) -> None:
    """Arbitrary software: the list of files gets one more, without a signature."""
    file = newest(mirror, "targets")
    evil = {"length": 4, "hashes": {HASH: sha256(b"evil")}}
    edited(file, targets={"v20260725.1/images.json.gz": evil})


def _not_json(publisher: Publisher, mirror: Path) -> None:
    (mirror / "metadata/timestamp.json").write_text("<html>welcome to the hotel</html>")


def _another_root(publisher: Publisher, mirror: Path) -> None:
    """A second root, signed by nobody the first one names."""
    thief = Publisher(publisher.home / "thief")
    thief.build()
    thief.release()
    thief.rotate("root")
    shutil.copyfile(thief.out / "metadata/2.root.json", mirror / "metadata/2.root.json")


def _skipped_root(publisher: Publisher, mirror: Path) -> None:
    """The third root in place of the second, so that the second one's revocations are never seen."""
    publisher.rotate("root")
    publisher.rotate("root")
    shutil.copyfile(publisher.out / "metadata/3.root.json", mirror / "metadata/2.root.json")


ATTACKS = {
    "root signed by a stranger": (_another_root, Reason.SIGNATURE),
    "root left out": (_skipped_root, Reason.SIGNATURE),
    "timestamp signed by a stranger": (_strip_signatures("timestamp"), Reason.SIGNATURE),
    "snapshot signed by a stranger": (_strip_signatures("snapshot"), Reason.MISMATCH),
    "targets signed by a stranger": (_strip_signatures("targets"), Reason.MISMATCH),
    "targets with more in them": (_more_targets, Reason.MISMATCH),
    "mix and match: snapshot of another state": (_swap_snapshot, Reason.MISMATCH),
    # It is longer than the snapshot says, and not read any further.
    "mix and match: targets of another state": (_swap_targets, Reason.ENDLESS),
    "mix and match: targets of an older state": (_old_targets_under_the_new_name, Reason.MISMATCH),
    "endless timestamp": (_endless_metadata, Reason.ENDLESS),
    "no metadata at all": (_not_json, Reason.MALFORMED),
    "list of images of another release": (_other_images, Reason.MISMATCH),
    "layer with other content": (_other_layer, Reason.MISMATCH),
    "layer cut short": (_shorter_layer, Reason.MISMATCH),
    "endless layer": (_longer_layer, Reason.ENDLESS),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(name: str, publisher: Publisher, host: Host, mirror: Path) -> None:
    attack, reason = ATTACKS[name]
    before = host.files(), host.layers()
    attack(publisher, mirror)

    with pytest.raises(Refused) as refusal:
        host.download(mirror)

    assert refusal.value.reason is reason, str(refusal.value)
    assert str(refusal.value).count(f"from file://{mirror}") == 1
    assert (host.files(), host.layers()) == before
    # And the attempt has damaged nothing: the true repository is followed as if it had not been.
    assert host.download(publisher.out).name > "images.v20260725.0.json"


# With stolen online keys: they cannot make a host run anything, nor go back.


def test_a_thief_of_the_online_keys_cannot_change_the_list_of_files(
    publisher: Publisher, host: Host, mirror: Path
) -> None:
    targets = newest(mirror, "targets")
    evil = {"length": 4, "hashes": {HASH: sha256(b"evil")}}
    edited(targets, targets={"v20260725.1/images.json.gz": evil})
    content = targets.read_bytes()
    meta = {"version": 3, "length": len(content), "hashes": {HASH: sha256(content)}}
    snapshot = newest(mirror, "snapshot")
    signed_by(publisher, "snapshot", snapshot, meta={"targets.json": meta})
    content = snapshot.read_bytes()
    meta = {"version": 3, "length": len(content), "hashes": {HASH: sha256(content)}}
    signed_by(publisher, "timestamp", mirror / "metadata/timestamp.json", meta={"snapshot.json": meta})
    with pytest.raises(Refused) as refusal:
        host.download(mirror)
    assert refusal.value.reason is Reason.SIGNATURE
    assert "targets" in str(refusal.value)


def test_a_thief_of_the_online_keys_cannot_go_back_to_an_older_list(
    publisher: Publisher, host: Host, mirror: Path
) -> None:
    host.download(mirror)
    old = (publisher.out / "metadata/2.snapshot.json").read_bytes()
    meta = {"version": 2, "length": len(old), "hashes": {HASH: sha256(old)}}
    signed_by(publisher, "timestamp", mirror / "metadata/timestamp.json", version=99, meta={"snapshot.json": meta})
    with pytest.raises(Refused) as refusal:
        host.download(mirror)
    assert refusal.value.reason is Reason.ROLLBACK


# Time


def test_rollback_an_older_state_is_refused_by_who_has_seen_a_newer_one(publisher: Publisher, host: Host) -> None:
    old = publisher.copy("old")
    publisher.build(b"fixed")
    publisher.release("v20260725.1")
    host.download(publisher.out)
    with pytest.raises(Refused) as refusal:
        host.download(old)
    assert refusal.value.reason is Reason.ROLLBACK


def test_freeze_a_state_that_is_kept_from_moving_on_counts_until_it_expires(publisher: Publisher, host: Host) -> None:
    publisher.now -= timedelta(days=6, hours=23)
    publisher.renew()
    host.download(publisher.copy("frozen"))  # an hour left

    publisher.now -= timedelta(hours=2)
    publisher.renew()
    with pytest.raises(Refused) as refusal:
        host.download(publisher.copy("frozen later"))
    assert refusal.value.reason is Reason.EXPIRED
    assert "this host's clock says" in str(refusal.value)


@pytest.mark.parametrize(("role", "age"), [("timestamp", 8), ("snapshot", 31), ("targets", 366), ("root", 366)])
def test_expired_metadata_is_refused(role: str, age: int, publisher: Publisher, host: Host) -> None:
    if role == "root":
        publisher.now -= timedelta(days=age)
        publisher.rotate("root")
        publisher.now += timedelta(days=age)
        publisher.renew(within=timedelta(0))
        newest(publisher.out, "root").unlink()  # the one that has been renewed
    else:
        publisher.now -= timedelta(days=age)
        with publisher.repository.locked():
            if role == "targets":
                with publisher.repository.edit_targets():
                    pass
                publisher.now += timedelta(days=age)
            publisher.repository.do_snapshot(force=True)
            if role == "snapshot":
                publisher.now += timedelta(days=age)
            publisher.repository.do_timestamp(force=True)
    with pytest.raises(Refused) as refusal:
        host.download(publisher.out)
    assert refusal.value.reason is Reason.EXPIRED
    assert role in str(refusal.value)


def test_what_has_expired_counts_again_when_it_is_signed_again(publisher: Publisher, host: Host) -> None:
    publisher.now -= timedelta(days=40)
    publisher.renew()
    with pytest.raises(Refused):
        host.download(publisher.out)
    publisher.now += timedelta(days=40)
    publisher.renew()
    assert host.download(publisher.out).name == "images.v20260725.0.json"


# Keys


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_hosts_follow_when_keys_are_rotated(role: str, publisher: Publisher, host: Host) -> None:
    host.download(publisher.out)
    for _ in range(3):
        publisher.rotate(role)
    publisher.build(b"new keys")
    publisher.release("v20260725.1")
    assert host.download(publisher.out).name == "images.v20260725.1.json"


def test_keys_that_have_been_replaced_count_no_more(publisher: Publisher, host: Host) -> None:
    """A stolen timestamp key: after its rotation, who holds it cannot even keep a host back."""
    thief = publisher.copy("thief")
    shutil.copytree(publisher.home / "keys", publisher.home / "stolen")
    publisher.rotate("timestamp")
    host.download(publisher.out)
    stolen = Publisher(publisher.home)
    stolen.ring = type(stolen.ring)(publisher.home / "stolen/offline", publisher.home / "stolen/online")
    signed_by(stolen, "timestamp", thief / "metadata/timestamp.json", version=100)
    shutil.copyfile(publisher.out / "metadata/2.root.json", thief / "metadata/2.root.json")
    with pytest.raises(Refused) as refusal:
        host.download(thief)
    assert refusal.value.reason is Reason.SIGNATURE


def test_fewer_signatures_than_the_threshold_are_refused(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, policy=RootPolicy(keys=3, threshold=2))
    publisher.build()
    publisher.release("v20260725.0")
    host = Host(tmp_path / "host", publisher.root)
    host.download(publisher.out)
    publisher.rotate("snapshot")  # a second root, by all three
    root = publisher.out / "metadata/2.root.json"
    for key in sorted((tmp_path / "keys/offline").glob("root.*"))[1:]:
        key.unlink()
    signed_by(publisher, "root", root)
    with pytest.raises(Refused) as refusal:
        host.download(publisher.out)
    assert refusal.value.reason is Reason.SIGNATURE
    assert "1/2" in str(refusal.value)


# Where trust comes from


def test_a_host_without_a_root_trusts_nobody(tmp_path: Path, publisher: Publisher) -> None:
    host = Host(tmp_path / "host", tmp_path / "missing.json")
    with pytest.raises(NoTrust, match="trusts no repository yet"):
        host.download(publisher.out)


def test_another_root_is_not_taken_while_one_is_trusted(publisher: Publisher, host: Host) -> None:
    host.download(publisher.out)
    stranger = Publisher(publisher.home / "stranger")
    stranger.build()
    stranger.release("v20260725.9")
    with pytest.raises(NoTrust, match="trusts another root"):
        host.trusting(stranger.out).trust(stranger.root)
    with pytest.raises(Refused):
        host.download(stranger.out)
    host.trusting(publisher.out).trust(publisher.root)  # the same again is no harm


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"<html>", None])
def test_what_is_no_root_begins_no_trust(content: bytes | None, publisher: Publisher, host: Host) -> None:
    root = publisher.home / "given.json"
    root.write_bytes((publisher.out / "metadata/timestamp.json").read_bytes() if content is None else content)
    with pytest.raises(NoTrust):
        host.trusting(publisher.out).trust(root)
    assert not (host.state / "tuf/metadata/root.json").exists()


def test_a_root_somebody_edited_begins_no_trust(publisher: Publisher, host: Host) -> None:
    root = publisher.home / "given.json"
    shutil.copyfile(publisher.root, root)
    edited(root, expires="2099-01-01T00:00:00Z")
    with pytest.raises(NoTrust, match="is no root"):
        host.trusting(publisher.out).trust(root)


# What is not there


@pytest.mark.parametrize("version", ["v20200101.0", "../../etc", "dev", "v20260725.0/../x"])
def test_a_version_that_was_not_released_is_not_made_up(version: str, publisher: Publisher, host: Host) -> None:
    with pytest.raises(NotReleased):
        host.download(publisher.out, version)


def test_a_file_beside_the_signed_ones_is_not_downloaded(publisher: Publisher, host: Host) -> None:
    (publisher.out / "targets/layers/evil.squashfs").write_bytes(b"evil")
    with pytest.raises(NotReleased, match=r"has not signed any layers/evil\.squashfs"):
        host.trusting(publisher.out).fetch("layers/evil.squashfs", host.state / "evil")


def test_a_repository_that_is_not_there_is_unavailable(tmp_path: Path, host: Host) -> None:
    with pytest.raises(Unavailable):
        host.download(tmp_path / "nowhere")
    with pytest.raises(Unavailable, match="is no repository"):
        host.download("ftp://example.org/tuf")


def test_a_release_that_lacks_a_file_leaves_no_list(publisher: Publisher, host: Host) -> None:
    target_file(publisher.out, "layers/*.base.squashfs").unlink()
    with pytest.raises(DownloadFailed):
        host.download(publisher.out)
    assert host.files() == {}
