"""Certificates name their holders, and rules of access are read against those names."""

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pytest import param

from flynn.identity import ANYONE, INSIDERS, Identity, Peer, PeerKind, access
from flynn.identity.authority import ClusterCA, expiry_of, write_private
from flynn.identity.peer import peer_of

CONTROLLER = Peer(PeerKind.APP, "controller", "web")
HOST = Peer(PeerKind.HOST, "node1")
OPERATOR = Peer(PeerKind.OPERATOR, "key")
OUTSIDE = Peer(PeerKind.OUTSIDE, "router")


@pytest.mark.parametrize("peer", [CONTROLLER, HOST, Peer(PeerKind.APP, "a/b c", "d%e")])
def test_names_survive_the_certificate(peer: Peer) -> None:
    assert Peer.parse(peer.uri) == peer


@pytest.mark.parametrize(
    "uri",
    [
        "flynn://operator/key",
        "flynn://app/",
        "https://app/controller/web",
        "flynn://app/a/b/c",
        "flynn://nobody/x",
        "",
    ],
)
def test_other_names_are_nobody(uri: str) -> None:
    assert Peer.parse(uri) is None


@pytest.mark.parametrize(
    ("rule", "peer", "admitted"),
    [
        param(access("host"), HOST, True, id="the host"),
        param(access("host"), CONTROLLER, False, id="not an app"),
        param(access("app:controller"), CONTROLLER, True, id="that app"),
        param(access("app:router"), CONTROLLER, False, id="another app"),
        param(access("app:*"), CONTROLLER, True, id="any app"),
        param(access("operator"), OPERATOR, True, id="the key"),
        param(
            access("app:*"), OUTSIDE, False, id="the router's certificate does not make its users part of the platform"
        ),
        param(access("outside"), OUTSIDE, True, id="an endpoint for everybody who comes through the router"),
        param(access("operator"), None, False, id="nobody"),
        param(INSIDERS, None, False, id="nobody is inside"),
        param(ANYONE, None, True, id="open"),
    ],
)
def test_rules(rule: object, peer: Peer | None, admitted: bool) -> None:
    assert rule.admits(peer) is admitted  # type: ignore[attr-defined]


def test_an_app_named_host_is_not_a_host() -> None:
    assert not access("host").admits(Peer(PeerKind.APP, "host"))


def test_a_certificate_verifies_against_its_authority_and_carries_its_names(tmp_path: Path) -> None:
    authority = ClusterCA.create()
    authority.save(tmp_path / "ca")
    again = ClusterCA.load(tmp_path / "ca")
    credentials = again.issue_job("controller", "web", "controller", ["10.0.0.5"])
    credentials.write(tmp_path / "job")
    text = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "job" / "cert.pem", "-noout", "-text"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in ("flynn://app/controller/web", "controller.discoverd", "leader.controller.discoverd", "10.0.0.5"):
        assert name in text
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", tmp_path / "job" / "ca.pem", tmp_path / "job" / "cert.pem"],
        capture_output=True,
    )
    assert verified.returncode == 0
    assert (tmp_path / "job" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600


def test_job_certificates_live_for_a_day() -> None:
    now = datetime(2024, 5, 1, tzinfo=UTC)
    credentials = ClusterCA.create(now=now).issue(CONTROLLER, now=now)
    begins, ends = expiry_of(credentials.cert)
    assert begins < now
    assert ends - now == timedelta(days=1)


def test_the_peer_is_read_from_what_the_tls_library_reports() -> None:
    assert peer_of({"subjectAltName": (("DNS", "x"), ("URI", CONTROLLER.uri))}) == CONTROLLER
    assert peer_of({"subjectAltName": (("DNS", "flynn://app/controller"),)}) is None
    assert peer_of(None) is None


def test_a_renewed_certificate_makes_a_new_context(tmp_path: Path) -> None:
    authority = ClusterCA.create()
    authority.issue_job("a", "web", "", []).write(tmp_path)
    identity = Identity.load(tmp_path)
    first = identity.client_context()
    assert identity.client_context() is first
    authority.issue_job("a", "web", "", []).write(tmp_path)
    assert identity.client_context() is not first
    server = identity.server_context()
    identity.refresh(server)
    assert server.verify_mode is ssl.CERT_REQUIRED


def test_a_missing_identity_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ca\.pem"):
        Identity.load(tmp_path)


def test_a_private_file_is_replaced_whole(tmp_path: Path) -> None:
    write_private(tmp_path / "f", b"one")
    write_private(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
