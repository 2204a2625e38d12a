"""A release on a host: what is written, what is fetched again, what survives."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tuf.api.metadata import TargetFile

from flynn.bootstrap.main import load_images
from flynn.host.cli.download import download
from flynn.host.download.errors import Reason, Refused
from flynn.host.download.pull import MAX_SMALL_BYTES
from flynn.host.main import cli
from flynn.images.repository import HASH
from tests.publisher import Publisher, images_of

from .conftest import Host


def _states(host: Host) -> dict[str, str]:
    return {pulled.layer["id"]: pulled.state for pulled in host.told if pulled.type == "layer"}


def test_bootstrap_reads_the_list_and_jobs_know_where_layers_are(publisher: Publisher, host: Host) -> None:
    images = load_images(host.download(publisher.out))
    assert sorted(images) == ["controller", "router"]
    router = images["router"]
    assert router.layer_url(router.image().layers()[0]) == f"file://{publisher.out}?target=/layers/base.squashfs"
    assert router.uri == f"file://{publisher.out}?name=router&target=/images/{router.hashes['sha512_256']}.json"
    assert router.image().id() == router.hashes["sha512_256"]


def test_each_layer_is_told_once_and_each_image_with_its_artifact(publisher: Publisher, host: Host) -> None:
    images = images_of(host.download(publisher.out))
    told = [(pulled.type, pulled.name) for pulled in host.told]
    assert sorted(told) == [("image", "controller"), ("image", "router"), ("layer", "controller"), ("layer", "router")]
    assert {p.name: p.artifact["uri"] for p in host.told if p.artifact} == {n: a.uri for n, a in images.items()}


def test_what_is_here_is_not_fetched_again(publisher: Publisher, host: Host) -> None:
    host.download(publisher.out)
    publisher.build(b"new")
    publisher.release("v20260725.1")
    host.download(publisher.out)
    assert _states(host) == {"base": "present", "code-new": "fetched"}
    assert {Path(file).name for file in host.files()} == {"images.v20260725.0.json", "images.v20260725.1.json"}


@pytest.mark.parametrize("content", [b"tampered", b"DEBIAN" * 1000, b""])
def test_a_layer_on_the_disk_that_is_not_what_it_was_is_replaced(
    content: bytes, publisher: Publisher, host: Host
) -> None:
    host.download(publisher.out)
    (host.state / "layers/base.squashfs").write_bytes(content)
    host.download(publisher.out)
    assert _states(host)["base"] == "fetched"
    assert host.layers()["base"] == b"debian" * 1000


def test_an_older_version_can_be_asked_for(publisher: Publisher, host: Host) -> None:
    publisher.build(b"new")
    publisher.release("v20260725.1")
    assert host.download(publisher.out, "v20260725.0").name == "images.v20260725.0.json"


@pytest.mark.parametrize("broken", ["root_history/1.root.json", "timestamp.json", "snapshot.json", "targets.json"])
def test_a_power_cut_that_emptied_a_file_of_the_trust_is_survived(
    broken: str, publisher: Publisher, host: Host
) -> None:
    host.download(publisher.out)
    (host.state / "tuf/metadata" / broken).write_bytes(b"")
    publisher.rotate("root")
    assert host.download(publisher.out)


def test_the_newest_root_that_is_whole_counts(publisher: Publisher, host: Host) -> None:
    publisher.rotate("root")
    host.download(publisher.out)
    host.root.unlink()
    (host.state / "tuf/metadata/root_history/2.root.json").write_bytes(b"")
    (host.state / "tuf/metadata/root.json").unlink()
    assert host.download(publisher.out)


def _list_of_images(publisher: Publisher, content: bytes) -> None:
    name = "v20260725.7/images.json.gz"
    target = TargetFile.from_data(name, content, [HASH])
    with publisher.repository.locked():
        publisher.repository.place(target, content)
        publisher.repository.publish({name: target})


def _with_layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(images: dict[str, Any]) -> None:
        images["router"]["manifest"]["rootfs"][0]["layers"][0].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_with_layer(id="../../../etc/x"), Reason.MALFORMED, id="a layer outside of the store"),
        pytest.param(_with_layer(hashes={"sha512_256": "00"}), Reason.MALFORMED, id="two contents of one layer"),
        pytest.param(_with_layer(type="tar"), Reason.MALFORMED, id="a layer of another kind"),
    ],
)
def test_even_signed_lists_are_read_with_care(
    change: Callable[[dict[str, Any]], None], reason: Reason, publisher: Publisher, host: Host
) -> None:
    images = json.loads(host.download(publisher.out).read_bytes())
    change(images)
    _list_of_images(publisher, gzip.compress(json.dumps(images).encode()))
    with pytest.raises(Refused) as refusal:
        host.download(publisher.out, "v20260725.7")
    assert refusal.value.reason is reason


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(gzip.compress(b"0" * (MAX_SMALL_BYTES + 1)), id="a bomb"),
        pytest.param(gzip.compress(b"{}")[:-4], id="cut short"),
        pytest.param(b"{}", id="not compressed"),
        pytest.param(gzip.compress(b"[1]"), id="another shape"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(content: bytes, publisher: Publisher, host: Host) -> None:
    _list_of_images(publisher, content)
    with pytest.raises(Refused):
        host.download(publisher.out, "v20260725.7")


def test_a_layer_that_is_signed_but_not_the_one_the_image_means_is_refused(publisher: Publisher, host: Host) -> None:
    images = json.loads(host.download(publisher.out).read_bytes())
    (host.state / "layers/base.squashfs").unlink()
    for image in images.values():
        image["manifest"]["rootfs"][0]["layers"][0]["hashes"] = {"sha512_256": "0" * 64}
    _list_of_images(publisher, gzip.compress(json.dumps(images).encode()))
    with pytest.raises(Refused) as refusal:
        host.download(publisher.out, "v20260725.7")
    assert refusal.value.reason is Reason.MISMATCH
    assert "base" not in host.layers()


def test_two_downloads_at_once_both_succeed(publisher: Publisher, host: Host) -> None:
    """A download by hand while the daemon pulls: they take turns, file by file."""
    with ThreadPoolExecutor(4) as pool:
        downloads = [pool.submit(host.download, publisher.out) for _ in range(4)]
        assert {done.result().name for done in downloads} == {"images.v20260725.0.json"}
    assert host.layers() == {"base": b"debian" * 1000, "code-code": b"code"}
    assert not list((host.state / "layers").glob(".*"))


def test_beginnings_nobody_goes_on_with_are_removed(publisher: Publisher, host: Host) -> None:
    parts = host.state / "tuf/parts"
    parts.mkdir(parents=True)
    (parts / "old").write_text("old")
    (parts / "new").write_text("new")
    last_month = time.time() - 30 * 86400
    os.utime(parts / "old", (last_month, last_month))
    host.download(publisher.out)
    assert [file.name for file in parts.iterdir()] == ["new"]


# The command


def test_the_command_downloads_the_channels_version(publisher: Publisher, host: Host) -> None:
    places = [f"--state-dir={host.state}", f"--config-dir={host.config}"]
    run = CliRunner().invoke
    first = run(download, [*places, "-r", str(publisher.out), "--root", str(publisher.root)])
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{host.config}/images.v20260725.0.json\n"
    assert "v20260725.0 is here, 2 layers fetched, 0.0 MB" in first.stderr

    (host.config / "repository.txt").write_text(f"{publisher.out}\n")
    (host.config / "channel.txt").write_text("nightly\n")
    publisher.build(b"nightly")
    publisher.release("v20260725.1", channel="nightly")
    second = run(download, [*places, "--json"])
    lines = [json.loads(line) for line in second.stdout.splitlines()]
    assert lines[-1] == {
        "type": "done",
        "version": "v20260725.1",
        "images": f"{host.config}/images.v20260725.1.json",
        "bytes": 7,
    }
    assert {line["type"] for line in lines} == {"image", "layer", "done"}


def test_the_command_says_why_it_refuses(publisher: Publisher, host: Host) -> None:
    (host.config).mkdir(parents=True)
    (host.config / "tuf-root.json").write_bytes(publisher.root.read_bytes())
    (publisher.out / "metadata/timestamp.json").write_text("{}")
    arguments = ["download", f"--state-dir={host.state}", f"--config-dir={host.config}", "-r", str(publisher.out)]
    refused = CliRunner().invoke(cli, [*arguments, "--json"])
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["type"] == "error"
    assert "refused, not what a repository serves" in refused.stderr


def test_the_command_wants_a_repository(host: Host) -> None:
    result = CliRunner().invoke(download, [f"--state-dir={host.state}", f"--config-dir={host.config}"])
    assert "which repository?" in result.output
