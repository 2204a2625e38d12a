"""The pure rules of a push: packets, paths, stacks, releases, build jobs."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.gitreceive import pktline
from flynn.gitreceive.buildjob import ENV_DIR_COOKIE, Blobs, build_environment, build_job, configuration_archive
from flynn.gitreceive.matching import Advertise, Exchange, Service, match
from flynn.gitreceive.release import (
    Built,
    CannotBuild,
    Stack,
    build_resources,
    choose_stack,
    next_release,
    parse_bytes,
    parse_pairs,
    slug_artifact,
    slug_manifest,
)
from flynn.gitreceive.strays import is_stray
from flynn.slugbuilder import settings
from flynn.types.app import App
from flynn.types.artifact import Artifact, ImageManifest
from flynn.types.release import Port, ProcessType, Release
from flynn.types.resources import Limit

APP = App(id="app-id", name="shop")
STACK = Stack("heroku-18", "cflinuxfs3", "builder", "runner")


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("GET", "/shop.git/info/refs", Advertise("shop")),
        ("GET", "/shop/info/refs", Advertise("shop")),
        ("POST", "/shop.git/git-receive-pack", Exchange("shop", Service.RECEIVE_PACK)),
        ("POST", "/a-1/git-upload-pack", Exchange("a-1", Service.UPLOAD_PACK)),
        (
            "GET",
            "/6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11.git/info/refs",
            Advertise("6d2a6ba2-8b22-4d5e-9a07-0f2a3c9d1e11"),
        ),
        ("POST", "/shop.git/info/refs", None),
        ("GET", "/shop.git/git-receive-pack", None),
        ("GET", "/shop.git/HEAD", None),
        ("GET", "/Shop/info/refs", None),
        ("GET", "/a--b/info/refs", None),
        ("GET", "/../shop/info/refs", None),
        ("GET", "/info/refs", None),
        ("GET", "/" + "a" * 101 + "/info/refs", None),
    ],
)
def test_requests(method: str, path: str, wanted: object) -> None:
    assert match(method, path) == wanted


def test_the_advertisement_begins_with_the_service() -> None:
    assert pktline.advertisement("git-receive-pack") == b"001f# service=git-receive-pack\n0000"


@pytest.mark.parametrize(
    ("head", "asks"),
    [
        (pktline.packet(b"old new ref\0 report-status side-band-64k agent=x"), True),
        (pktline.packet(b"shallow 1") + pktline.packet(b"old new ref\0side-band-64k"), True),
        (pktline.packet(b"old new ref\0 report-status"), False),
        (pktline.packet(b"side-band-64k"), False),
        (b"0000", False),
        (b"", False),
        (b"zzzz\0side-band-64k", False),
    ],
)
def test_the_side_band_is_found_in_the_capabilities(head: bytes, asks: bool) -> None:
    assert pktline.asks_for_side_band(head) is asks


@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(1, 30))
def test_progress_passes_at_once_and_the_report_is_held(lines: list[bytes], cut: int) -> None:
    progress = b"".join(pktline.packet(b"\x02" + line) for line in lines)
    report = pktline.packet(b"\x01unpack ok") + pktline.packet(b"\x02late") + pktline.FLUSH
    holder = pktline.ReportHolder(side_band=True)
    wire = progress + report
    passed = b"".join(holder.feed(wire[at : at + cut]) for at in range(0, len(wire), cut))
    assert (passed, holder.rest()) == (progress, report)


def test_without_a_side_band_everything_is_held() -> None:
    holder = pktline.ReportHolder(side_band=False)
    assert holder.feed(pktline.packet(b"\x02x")) == b""
    assert holder.rest() == pktline.packet(b"\x02x")


def test_stacks() -> None:
    environ = {"SLUGBUILDER_18_IMAGE_ID": "b", "SLUGRUNNER_18_IMAGE_ID": "r"}
    assert choose_stack("", environ) == choose_stack("heroku-18", environ) == Stack("heroku-18", "cflinuxfs3", "b", "r")
    for unknown in ("cedar-14", "x"):
        with pytest.raises(CannotBuild, match=f'Unknown FLYNN_STACK: "{unknown}"'):
            choose_stack(unknown, environ)
    old = choose_stack("cedar-14", {"SLUGBUILDER_14_IMAGE_ID": "b", "SLUGRUNNER_14_IMAGE_ID": "r"})
    assert old.cf_name == "cflinuxfs2" and old.warnings[0].startswith("WARNING: The cedar-14 stack is deprecated")


def test_a_slug_image_runs_in_app_as_the_slugs_user() -> None:
    manifest = slug_manifest("abc", 4096)
    assert manifest.document() == {
        "_type": "application/vnd.flynn.image.manifest.v1+json",
        "entrypoints": {
            "_default": {
                "args": ["/runner/init", "bash"],
                "cwd": "/app",
                "uid": 5000,
                "gid": 5000,
                "env": {
                    "HOME": "/app",
                    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "TERM": "xterm",
                },
            }
        },
        "rootfs": [
            {
                "platform": {"architecture": "amd64", "os": "linux"},
                "layers": [
                    {
                        "id": "abc",
                        "type": "application/vnd.flynn.image.squashfs.v1",
                        "length": 4096,
                        "hashes": {"sha512_256": "abc"},
                    }
                ],
            }
        ],
    }
    artifact = slug_artifact("id", manifest, ["web", "worker"])
    assert artifact.uri == f"https://blobstore.discoverd:80/slugs/images/{manifest.id()}.json"
    assert artifact.size == len(manifest.canonical())
    assert artifact.meta == {"blobstore": "true", "slugbuilder.process_types": "web,worker"}


@pytest.mark.parametrize(
    ("app", "push", "stray"),
    [
        (APP, "old", True),
        (APP, "new", False),
        (APP, "", False),  # by hand
        (App(id="other", name="other"), "old", False),
    ],
)
def test_a_build_of_another_push_of_the_same_app_is_a_stray(app: App, push: str, stray: bool) -> None:
    job = build_job(
        app,
        None,
        Artifact(id="builder", manifest=ImageManifest().document()),
        host_id="h",
        uuid="0",
        volume="v",
        environment={},
        resources={},
        push=push,
    )
    assert is_stray(job, APP.id, "new") is stray


def test_a_release_keeps_what_was_set_by_hand_and_drops_vanished_types() -> None:
    by_hand = ProcessType(args=["old"], service="mine", ports=[Port(port=9000, proto="tcp")], env={"A": "b"})
    limits = ProcessType(resources={"memory": Limit(limit=1)})
    previous = Release(
        id="old",
        env={"X": "1", "Y": "1"},
        meta={"kept": "1"},
        processes={"web": by_hand, "gone": by_hand, "slugbuilder": limits},
    )
    release = next_release(
        APP,
        previous,
        artifacts=["r", "s"],
        types=["web", "admin-web", "worker"],
        env={"Y": "2"},
        meta={"git": "true"},
        stack=STACK,
    )
    assert release.env == {"X": "1", "Y": "2"}
    assert release.meta == {"kept": "1", "git": "true", "slugrunner.stack": "heroku-18"}
    assert sorted(release.processes) == ["admin-web", "slugbuilder", "web", "worker"]
    web = release.processes["web"]
    assert (web.args, web.service, web.ports, web.env) == (
        ["/runner/init", "start", "web"],
        "mine",
        by_hand.ports,
        {"A": "b"},
    )
    assert release.processes["admin-web"].service == "shop-admin-web"
    assert release.processes["worker"].ports == []
    assert release.processes["slugbuilder"] == limits


def test_names_of_process_types_come_from_untrusted_code() -> None:
    assert Built(sha512_256="x", length=1, process_types={"web": "", "a": ""}).types() == ["a", "web"]
    for name in ("", "a,b", "a b", "x" * 64, "../x"):
        with pytest.raises(CannotBuild):
            Built(sha512_256="x", length=1, process_types={name: ""}).types()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2147483648),
        ("512M", 512 << 20),
        ("1024", 1024),
        ("1.5k", 1536),
        ("2GiB", 2 << 30),
        ("", None),
        ("x", None),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_limits_of_a_build() -> None:
    assert build_resources(None, "")["memory"].limit == 1 << 30
    assert build_resources(None, "2GB")["memory"] == Limit(request=2 << 30, limit=2 << 30)
    own = Release(processes={"slugbuilder": ProcessType(resources={"memory": Limit(limit=500)})})
    assert build_resources(own, "2GB")["memory"].limit == 500


def test_pairs() -> None:
    assert parse_pairs(["A=b=c", "D="]) == {"A": "b=c", "D": ""}
    with pytest.raises(CannotBuild, match='invalid var format: "x"'):
        parse_pairs(["x"])


def test_a_build_job_holds_signed_urls_and_no_secret() -> None:
    environment = build_environment(
        Blobs.of(APP, "build-id"),
        stack=STACK,
        revision="c0ffee",
        app_env={"BUILDPACK_URL": "https://x/y", "DATABASE_URL": "secret"},
        environ={"CONTROLLER_KEY": "k", "BLOBSTORE_SIGNING_KEY": "k", "SSH_CLIENT_KEY": "ssh", "PIP_INDEX_URL": "p"},
        blobstore_url="https://blobstore.discoverd:80",
        ca_pem="CA",
        signing_key="k",
        now=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert sorted(environment) == [
        "BLOBSTORE_CA",
        "BUILDPACK_URL",
        "BUILD_CACHE_GET_URL",
        "BUILD_CACHE_PUT_URL",
        "BUILD_SECONDS",
        "CF_STACK",
        "PIP_INDEX_URL",
        "RESULT_PUT_URL",
        "SLUG_PUT_URL",
        "SOURCE_VERSION",
        "SSH_CLIENT_KEY",
        "STACK",
    ]
    assert environment["BUILD_CACHE_GET_URL"].startswith("https://blobstore.discoverd:80/app-id-cache.tgz?expires=")
    assert settings.Settings.from_environment(environment).slug_put_url == environment["SLUG_PUT_URL"]
    builder = Artifact(type="flynn", manifest=ImageManifest().document())
    job = build_job(
        APP,
        None,
        builder,
        host_id="h",
        uuid="u",
        volume="v",
        environment=environment,
        resources=build_resources(None, ""),
    )
    assert (job.id, job.partition, job.config.stdin, job.config.disable_log) == ("h-u", "background", True, True)
    assert "flynn-system-app" not in job.metadata and "flynn-controller.formation" not in job.metadata
    assert job.config.volumes[0].delete_on_stop


def test_configuration_is_one_file_per_variable() -> None:
    assert configuration_archive({}) == b""
    archive = configuration_archive({"A": "line\nline", "EMPTY": "", "../x": "no", "": "no"})
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]  # files
    assert found == {f"{ENV_DIR_COOKIE}/A": b"line\nline", f"{ENV_DIR_COOKIE}/EMPTY": b""}
    assert ENV_DIR_COOKIE == settings.ENV_DIR_COOKIE
