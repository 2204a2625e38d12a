"""Bad input gets the right status and a clear message; user jobs reach nothing that is not theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest import param

from tests.cluster.conftest import User

pytestmark = pytest.mark.cluster

JSON = ("-H", "Content-Type: application/json")


@pytest.fixture
def api(user: User) -> str:
    return f"https://controller.{user.domain}"


@pytest.fixture
def key(user: User) -> tuple[str, ...]:
    return ("-k", "-u", f":{user.env['CONTROLLER_KEY']}")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        param("POST", "/apps", "{", 400, "syntax_error", id="malformed JSON"),
        param("POST", "/apps", "", 400, "", id="no body"),
        param("POST", "/apps", '{"name": 7}', 400, "name", id="wrong type"),
        param("POST", "/apps", '{"name": "Not A Name"}', 400, "name", id="bad name"),
        param("GET", "/apps/nosuch", None, 404, "", id="unknown app"),
        param("GET", "/apps/nosuch/jobs", None, 404, "", id="jobs of an unknown app"),
        param("GET", "/nowhere", None, 404, "404 page not found", id="unknown path"),
        param("PATCH", "/apps", "{}", 404, "404 page not found", id="unknown method"),
        param("GET", "/releases/not-a-uuid", None, 404, "", id="a malformed id"),
        param(
            "POST",
            "/apps/controller/deploy",
            '{"id": "11111111-1111-4111-8111-111111111111"}',
            400,
            "release",
            id="unknown release",
        ),
        param("POST", "/releases", '{"app_id": "nosuch"}', 400, "", id="a release of no app"),
    ],
)
def test_bad_requests(
    user: User, api: str, key: tuple[str, ...], method: str, path: str, body: str | None, status: int, text: str
) -> None:
    more = () if body is None else (*JSON, "-d", body)
    got, answer = user.get(api + path, "-X", method, *key, *more)
    assert got == status, answer
    assert text in answer
    assert "Traceback" not in answer


def test_an_oversized_body(user: User, api: str, key: tuple[str, ...]) -> None:
    big = user.home / "big.json"
    big.write_text(json.dumps({"name": "x" * 40_000_000}))
    got, answer = user.get(f"{api}/apps", "-X", "POST", *key, *JSON, "--data-binary", f"@{big}")
    assert got in (400, 413), answer


@pytest.mark.parametrize("options", [("-k",), ("-k", "-u", ":wrong")], ids=["no key", "a wrong key"])
def test_bad_keys(user: User, api: str, options: tuple[str, ...]) -> None:
    assert user.get(f"{api}/apps", *options) == (401, "")


def test_git_with_a_wrong_key(user: User) -> None:
    status, _ = user.get(f"https://git.{user.domain}/shop.git/info/refs?service=git-receive-pack", "-k", "-u", ":wrong")
    assert status == 401


def test_the_client_says_what_is_wrong(user: User) -> None:
    for arguments, text in [
        (("-a", "nosuch", "ps"), "not found"),
        (("nosuchcommand",), "is not a flynn command"),
        (("-a", "nosuch", "scale", "web=1"), "no app release"),
        (("-a", "nosuch", "kill", "x"), "could not kill"),
    ]:
        done = user.run("flynn", *arguments)
        assert done.returncode == 1
        assert text.lower() in (done.stdout + done.stderr).lower()
        assert "Traceback" not in done.stderr


PROBES = {
    "host API": "https://{host}:1113/host/jobs",
    "discoverd": "https://{host}:1111/services/x/instances",
    "router API": "https://{host}:5000/",
    "controller": "https://controller.discoverd:80/apps",
    "blobstore": "https://blobstore.discoverd:80/x",
    "postgres API": "https://postgres-api.discoverd:80/databases",
    "log aggregator": "https://logaggregator.discoverd:80/log/x",
    "gitreceive": "https://gitreceive.discoverd:5000/",
}

PROBE = """
import socket, ssl, sys, urllib.error, urllib.request
context = ssl._create_unverified_context()
try:
    print("ANSWERED", urllib.request.urlopen(sys.argv[1], timeout=4, context=context).status)
except urllib.error.HTTPError as error:
    print("REFUSED", error.code)
except Exception as error:
    print("UNREACHABLE", type(error).__name__)
"""


@pytest.mark.parametrize("name", list(PROBES))
def test_a_user_job_reaches_no_control_api(user: User, shop: Path, name: str) -> None:
    url = PROBES[name].format(host=user.env["NODE_IPS"].split(",")[0])
    done = user.run("flynn", "-a", "shop", "run", "python3", "-c", PROBE, url)
    assert done.stdout.startswith(("UNREACHABLE", "REFUSED 401", "REFUSED 403")), done.stdout + done.stderr


def test_a_user_job_has_no_identity_and_no_privileges(user: User, shop: Path) -> None:
    script = "ls /run/flynn/identity 2>&1; mount -t tmpfs x /mnt 2>&1; head -c1 /proc/kcore 2>&1"
    done = user.run("flynn", "-a", "shop", "run", "sh", "-c", script)
    out = done.stdout
    assert "No such file" in out
    assert "mount:" in out or "permission denied" in out.lower() or "not permitted" in out.lower()
