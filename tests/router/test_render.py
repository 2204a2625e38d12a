"""The configuration, byte for byte. `GOLDEN=write` in the environment writes the files anew; review them as a diff."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from flynn.router.render import Rendered, Settings, render
from flynn.router.table import Certificate, ServiceState, build
from flynn.types.instance import Instance
from flynn.types.route import Certificate as RouteCertificate
from flynn.types.route import Route
from tests.router.conftest import make_pair

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Settings(
    listen_ip="192.0.2.1",
    http_port=80,
    https_port=443,
    default_pair=Certificate("default certificate\ndefault key\n"),
    cookie_key=bytes(32),
)


def http(number: int, domain: str, service: str, path: str = "/", **rest: object) -> Route:
    return Route(type="http", id=f"r{number}", domain=domain, service=service, path=path, **rest)  # type: ignore[arg-type]


def instance(number: int, proto: str = "http") -> Instance:
    return Instance.at(f"100.64.1.{number}:8080", proto)


SERVICES = {
    "shop-web": ServiceState((instance(1), instance(2)), instance(2)),
    "api-web": ServiceState((instance(3),)),
    "controller": ServiceState((instance(9, "https"),)),
    "mail": ServiceState((instance(5),)),
}

CASES: dict[str, tuple[list[Route], Settings]] = {
    "empty": ([], SETTINGS),
    "typical": (
        [
            http(1, "controller.example.net", "controller"),
            http(2, "shop.example.net", "shop-web", drain_backends=True),
            http(3, "shop.example.net", "api-web", "/api"),
            http(4, "*.tenants.example.net", "shop-web", sticky=True),
            http(5, "*", "api-web"),
        ],
        replace(SETTINGS, identity="our certificate\n", ca="the authority\n"),
    ),
    "every_option": (
        [
            http(1, "own.example.net", "shop-web", certificate=RouteCertificate(cert="own", key="key")),
            http(2, "*.wild.example.net", "shop-web", tls_cert="wild", tls_key="key"),
            http(3, "plain.wild.example.net", "api-web", leader=True, disable_keep_alives=True),
            http(4, "extra.example.net", "api-web", port=8080),
            Route(type="tcp", id="t1", port=3000, service="mail"),
            Route(type="tcp", id="t2", port=3001, service="mail", leader=True),
        ],
        replace(
            SETTINGS,
            additional_http_ports=(8080,),
            additional_https_ports=(8443,),
            proxy_protocol=True,
            unavailable_page=b"<h1>Back soon</h1>",
        ),
    ),
    "no_default_pair": ([http(1, "a.example.net", "shop-web")], replace(SETTINGS, default_pair=None, listen_ip="")),
}


def rendered(case: str) -> Rendered:
    routes, settings = CASES[case]
    ports = frozenset((*settings.additional_http_ports, *settings.additional_https_ports))
    state = build(routes, SERVICES, additional_ports=ports)
    assert not state.problems
    return render(state, settings)


def as_text(files: dict[str, bytes]) -> str:
    return "".join(
        f"==> {name} <==\n{content.decode()}\n".replace("\r", "\\r") for name, content in sorted(files.items())
    )


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    text = as_text(rendered(case).files("/state/live", "/run/flynn-router"))
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_haproxy_accepts_it(case: str, tmp_path: Path) -> None:
    pair = "".join(make_pair("a.example"))
    content = rendered(case)
    certificates = {name: pair for name in content.certificates}
    valid = replace(
        content, certificates=certificates, ca=pair.partition("-----BEGIN PRIVATE")[0] if content.ca else ""
    )
    for name, data in valid.files(str(tmp_path), str(tmp_path)).items():
        (tmp_path / name).write_bytes(data)
    outcome = subprocess.run(["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_the_private_keys_are_only_in_their_files() -> None:
    files = rendered("every_option").files("/state/live", "/run")
    for name, content in files.items():
        assert b"key" not in content.split(b"\n") or name.endswith(".pem")
    assert "default key" not in repr(rendered("every_option"))  # as it might be logged


def test_backends_are_not_part_of_the_skeleton() -> None:
    """What comes and goes all the time must not need a reload."""
    routes, settings = CASES["typical"]
    with_fewer = build(routes, {**SERVICES, "shop-web": ServiceState((instance(1),))})
    assert render(with_fewer, settings).generation == rendered("typical").generation
    renewed = replace(settings, identity="a renewed certificate\n")
    assert render(build(routes, SERVICES), renewed).generation == rendered("typical").generation
