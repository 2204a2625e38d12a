"""The wire rules: what is left out, what is always written, and what ids are computed over."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import param

from flynn.types.app import App
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, Entrypoint, ImageManifest, Layer, Platform, Rootfs
from flynn.types.codec import (
    ZERO_TIME,
    Wire,
    as_timedelta,
    canonical,
    decode,
    decode_first,
    encode,
    encode_indented,
    nanoseconds,
    replace,
)
from flynn.types.deployment import Deployment
from flynn.types.errors import BadSyntax, ValidationError
from flynn.types.formation import ExpandedFormation, ScaleRequest
from flynn.types.host import ActiveJob, HostJob, JobStatus
from flynn.types.instance import Instance, ServiceMeta
from flynn.types.release import Device, HealthCheck, Port
from flynn.types.resources import DEFAULTS, Limit, with_defaults
from flynn.types.route import Route
from flynn.types.status import Status, StatusDocument


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        param(App(name="shop"), '{"name":"shop","meta":{}}', id="an empty map that is always there"),
        param(Deployment(id="d"), '{"id":"d"}', id="empty values are left out"),
        param(ServiceMeta(), '{"data":null,"index":0}', id="null and zero that are always there"),
        param(
            ScaleRequest(id="s"),
            '{"id":"s","app":"","release":"","state":"","created_at":null,"updated_at":null}',
            id="times that may be null are written as null",
        ),
        param(ExpandedFormation(), '{"updated_at":"0001-01-01T00:00:00Z"}', id="the zero time is written"),
        param(
            ActiveJob(job=HostJob(id="h-1"), status=JobStatus.RUNNING),
            '{"job":{"id":"h-1","config":{}},"host_id":"","status":1,"created_at":"0001-01-01T00:00:00Z",'
            '"started_at":"0001-01-01T00:00:00Z","ended_at":"0001-01-01T00:00:00Z"}',
            id="status is a number, and starting is left out",
        ),
        param(Port(port=0), '{"port":0,"proto":""}', id="a port of zero is written"),
        param(HealthCheck(interval=nanoseconds(timedelta(seconds=2))), '{"interval":2000000000}', id="nanoseconds"),
        param(ActiveJob(job=HostJob(), exit_status=0).exit_status, "0", id="an exit status of zero is a status"),
    ],
)
def test_what_is_written(value: object, expected: str) -> None:
    assert encode(value).decode() == expected


def test_an_exit_status_of_zero_is_written() -> None:
    assert b'"exit_status":0' in encode(ActiveJob(job=HostJob(), exit_status=0))


def test_all_keys_of_a_device_are_written() -> None:
    assert len(decode(encode(Device()), dict)) == 9


def test_routes_write_their_times_and_flags() -> None:
    assert set(decode(encode(Route()), dict)) == {"type", "service", "leader", "created_at", "updated_at"}


def test_unknown_keys_are_ignored_and_null_equals_absence_where_it_is_allowed() -> None:
    assert decode(b'{"id":"d","surprise":[1],"processes":null}', Deployment) == Deployment(id="d")


def test_defaults_are_not_shared_between_values() -> None:
    App().meta["a"] = "b"
    assert App().meta == {}


@pytest.mark.parametrize(
    ("raw", "error", "text"),
    [
        param(b"{", BadSyntax, "invalid", id="not JSON"),
        param(b"\xff", BadSyntax, "invalid", id="not even text"),
        param(b'{"name":1}', ValidationError, "name expected `str`", id="a wrong type names the key"),
        param(b'{"meta":{"a":1}}', ValidationError, "meta", id="deep inside too"),
        param(b"[]", ValidationError, "Expected `object`", id="a wrong document"),
    ],
)
def test_bad_input_says_where(raw: bytes, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        decode(raw, App)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValidationError, match="addr must be set") as caught:
        decode(b'{"proto":"tcp"}', Instance)
    assert caught.value.detail == {"field": "addr"}


def test_times_of_go_are_read() -> None:
    class Stamped(Wire):
        at: datetime

    assert decode(b'{"at":"2024-05-01T10:00:00.123456789Z"}', Stamped).at.microsecond // 1000 == 123
    assert decode(b'{"at":"0001-01-01T00:00:00Z"}', Stamped).at == ZERO_TIME
    assert decode(b'{"at":"2024-05-01T12:00:00+02:00"}', Stamped).at == datetime(2024, 5, 1, 10, tzinfo=UTC)


def test_only_the_first_document_counts_where_go_reads_a_stream() -> None:
    assert decode_first(b' {"name":"a"} {"name":"b"}', App).name == "a"


def test_the_status_document() -> None:
    assert encode_indented(StatusDocument(data=Status())).decode() == (
        '{\n  "data": {\n    "status": "healthy",\n    "version": "dev"\n  }\n}\n'
    )


def the_reference_image() -> ImageManifest:
    layer = Layer(id="aa", type=SQUASHFS_TYPE, length=4096, hashes={"sha512_256": "bb"})
    return ImageManifest(
        entrypoints={"_default": Entrypoint(args=["/bin/x", "<&>"], env={"A": "b"})},
        rootfs=[Rootfs(platform=Platform(architecture="amd64", os="linux"), layers=[layer])],
    )


def test_the_reference_value_of_image_ids() -> None:
    image = the_reference_image()
    assert len(image.canonical()) == 302
    assert image.id() == "7ee0857b28f51812018564983e035e98220da8eeb9c73dbd5f0ce36e1a31f2da"


def test_an_artifact_carries_its_image() -> None:
    image = the_reference_image()
    artifact = Artifact(manifest=image.document(), layer_url_template="file:///layers/{id}.squashfs")
    assert decode(encode(artifact), Artifact).image() == image
    assert artifact.layer_url(image.layers()[0]) == "file:///layers/aa.squashfs"


def test_control_characters_have_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="control character"):
        canonical({"a": "line\nbreak"})


_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children)
        | st.dictionaries(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"])), children)
    ),
)


@given(_documents)
def test_canonical_json_is_json_with_sorted_keys(document: object) -> None:
    import json

    raw = canonical(document)
    assert json.loads(raw) == document
    assert canonical(json.loads(raw)) == raw


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=365)))
def test_durations_survive_the_wire(duration: timedelta) -> None:
    assert as_timedelta(nanoseconds(duration)) == duration


def test_replace_makes_a_changed_copy() -> None:
    app = App(name="a")
    assert (replace(app, name="b").name, app.name) == ("b", "a")


@pytest.mark.parametrize(
    ("given_resources", "name", "expected"),
    [
        param(None, "memory", DEFAULTS["memory"], id="nothing given"),
        param({"memory": Limit(limit=5)}, "memory", Limit(request=5, limit=5), id="a request copies the limit"),
        param({"cpu": Limit(request=1)}, "cpu", Limit(request=1, limit=1000), id="a limit comes from the defaults"),
        param({"max_procs": Limit(limit=9)}, "max_procs", Limit(request=9, limit=9), id="no default, but given"),
    ],
)
def test_limits_are_filled_in(given_resources: dict[str, Limit] | None, name: str, expected: Limit) -> None:
    assert with_defaults(given_resources)[name] == expected


def test_unlimited_stays_unlimited() -> None:
    assert "max_procs" not in with_defaults(None)
