"""`flynn cluster add` with its request for the certificate; names are resolved to the door of the test's API."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from flynn.cli.commands.cluster import add
from flynn.cli.config import Cluster
from flynn.cli.context import Context
from flynn.cli.errors import CliError
from flynn.controller.client import Controller
from flynn.http.client import HttpClient, KeyAuth, Pinned
from flynn.types.errors import Unauthorized, Unreachable
from tests.cli.conftest import User
from tests.controller.conftest import KEY


@dataclass
class NearContext(Context):
    """A context for which every controller is the one of the test."""

    near: str = ""

    def client_of(self, cluster: Cluster) -> Controller:
        tls = Pinned(cluster.tls_pin)
        return Controller(HttpClient(cluster.controller_url, auth=KeyAuth(cluster.key), tls=tls, connect_to=self.near))


async def cluster_add(user: User, key: str, pin: str) -> Context:
    context = NearContext(environ=user.env, near=user.controller_url.removeprefix("https://"))
    await add(context, False, False, "", False, "", "", False, pin, "one", "a.test", key)
    return Context(environ=user.env)


@pytest.fixture
def user(flynn: User, monkeypatch: pytest.MonkeyPatch) -> User:
    (flynn.home / "flynnrc").unlink()
    for name, value in flynn.env.items():
        monkeypatch.setenv(name, value)
    return flynn


async def test_the_certificate_is_fetched_and_git_told(
    user: User, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    after = await cluster_add(user, KEY, user.pin)
    assert capsys.readouterr().err == 'Cluster "one" added and set as default.\n'
    (cluster,) = after.config.clusters
    assert (cluster.controller_url, cluster.git_url, cluster.image_url) == (
        "https://controller.a.test",
        "https://git.a.test",
        "https://images.a.test",
    )
    pem = tmp_path / ".flynn" / "ca-certs" / "one.pem"
    assert pem.read_text().startswith("-----BEGIN CERTIFICATE-----")
    git = subprocess.run(["git", "config", "--global", "-l"], env=user.env, capture_output=True, text=True).stdout  # noqa: ASYNC221  # a moment
    assert f"http.https://git.a.test.sslcainfo={pem}\n" in git
    assert "credential.https://git.a.test.helper=" in git


async def test_a_wrong_key_or_pin_leaves_no_entry(user: User) -> None:
    with pytest.raises(Unauthorized):
        await cluster_add(user, "wrong", user.pin)
    with pytest.raises(Unreachable, match="does not match the pin"):
        await cluster_add(user, KEY, "q83vEjRWeJA0VniQEjRWeJASNFZ4kBI0VniQEjRWeJA=")
    with pytest.raises(CliError, match="no clusters configured"):
        Context(environ=user.env).config.choose("")
