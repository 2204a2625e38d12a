"""What becomes of routes as the controller hands them out."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import param

from flynn.router.table import (
    PoolKey,
    Problem,
    RoutingState,
    ServiceState,
    build,
    match,
    normal_domain,
    normal_path,
)
from flynn.types.instance import Instance
from flynn.types.route import Certificate, Route

_ids = itertools.count()


def http(domain: str, path: str = "/", service: str = "web", **rest: object) -> Route:
    return Route(type="http", id=f"r{next(_ids)}", domain=domain, path=path, service=service, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("Shop.Example.NET", "shop.example.net"),
        ("shop.example.net.", "shop.example.net"),
        ("*.Example.net", "*.example.net"),
        ("*", "*"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("a_b.example", "a_b.example"),
        ("example.com:8080", None),
        ("sub.*.example", None),
        ("*example.com", None),
        ("bad domain", None),
        ("a..b", None),
        ("", None),
        ("-a.example", None),
    ],
)
def test_domains(domain: str, expected: str | None) -> None:
    assert normal_domain(domain) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/"),
        ("/", "/"),
        ("/2", "/2/"),
        ("/a/b/", "/a/b/"),
        ("a", None),
        ("//", None),
        ("/a//b", None),
        ("/a b", None),
        ("/a;b", None),
        ("/a\nb", None),
    ],
)
def test_paths(path: str, expected: str | None) -> None:
    assert normal_path(path) == expected


HOSTS = [
    param("foo.bar", "/", "foo.bar/", id="exact"),
    param("FOO.bar", "/", "foo.bar/", id="case does not matter"),
    param("foo.bar:8443", "/", "foo.bar/", id="nor does the port"),
    param("foo.bar.", "/", "foo.bar/", id="nor a final dot"),
    param("a.foo.bar", "/", "a.foo.bar/", id="deeper exact beats the wildcard"),
    param("b.foo.bar", "/", "*.foo.bar/", id="wildcard"),
    param("a.b.c.d.e.f.foo.bar", "/", "*.foo.bar/", id="wildcard at any depth"),
    param("x.bar", "/", "*.bar/", id="shorter wildcard"),
    param("bar", "/", "*.bar/", id="a wildcard matches its own base"),
    param("else.where", "/", "*/", id="catch-all"),
    param("foo.bar", "/2", "foo.bar/2/", id="path without slash"),
    param("foo.bar", "/2/", "foo.bar/2/", id="path with slash"),
    param("foo.bar", "/22", "foo.bar/", id="only whole segments"),
    param("foo.bar", "//2///x", "foo.bar/2/", id="empty segments are nothing"),
    param("foo.bar", "/a/c/d", "foo.bar/", id="a gap is transparent"),
    param("foo.bar", "/a/c/d/c/x", "foo.bar/a/c/d/c/", id="longest path"),
    param("b.foo.bar", "/2", "*.foo.bar/", id="the first domain that matches decides"),
]


@pytest.mark.parametrize(("host", "path", "expected"), HOSTS)
def test_matching(host: str, path: str, expected: str) -> None:
    state = build(
        [
            http("foo.bar"),
            http("foo.bar", "/2"),
            http("foo.bar", "/a/c/d/c"),
            http("a.foo.bar"),
            http("*.foo.bar"),
            http("*.bar"),
            http("*"),
        ],
        {},
    )
    found = match(state, host, path)
    assert found is not None and found.domain + found.path == expected


def reasons(state: RoutingState) -> dict[str, str]:
    return {problem.route: problem.reason for problem in state.problems}


def test_what_cannot_be_served_is_left_out_with_a_reason() -> None:
    early, late = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    good = Route(type="http", id="good", domain="a.test", service="web", created_at=early)
    routes = [
        Route(type="http", id="twin", domain="A.test", service="other", created_at=late),
        good,
        Route(type="http", id="orphan", domain="b.test", path="/x", service="web"),
        Route(type="http", id="port", domain="c.test", port=8080, service="web"),
        Route(type="http", id="noservice", domain="d.test"),
        Route(type="udp", id="odd", service="web"),
        Route(type="tcp", id="web", port=80, service="web"),
        Route(type="tcp", id="big", port=70000, service="web"),
        Route(type="tcp", id="taken", port=3001, service="web"),
        Route(type="tcp", id="ok", port=3002, service="web"),
        Route(type="tcp", id="twice", port=3002, service="web", created_at=late),
    ]
    state = build(routes, {}, refused_ports={3001: "Address already in use"})
    assert [route.id for route in state.http] == ["good"]
    assert [route.id for route in state.tcp] == ["ok"]
    assert reasons(state) == {
        "http/twin": "the same domain and path belong to http/good",
        "http/orphan": "b.test has no route for /",
        "http/port": "port 8080 is not one of the additional ports",
        "http/noservice": "has no service",
        "udp/odd": "unknown type 'udp'",
        "tcp/web": "cannot listen on port 80",
        "tcp/big": "cannot listen on port 70000",
        "tcp/taken": "cannot listen on port 3001: Address already in use",
        "tcp/twice": "port 3002 belongs to tcp/ok",
    }


def test_a_bad_certificate_costs_only_itself() -> None:
    route = http("a.test", certificate=Certificate(cert="c", key="k"))
    state = build([route], {}, check_pair=lambda cert, key: "key values mismatch")
    assert [served.certificate for served in state.http] == [""]
    reason = "the default certificate is served instead of its own: key values mismatch"
    assert state.problems == (Problem(f"http/{route.id}", reason),)


def test_equal_certificates_are_one() -> None:
    pair = Certificate(cert="cert\n", key=" key")
    state = build([http("a.test", certificate=pair), http("b.test", tls_cert="cert", tls_key="key\n")], {})
    assert [certificate.pem for certificate in state.certificates.values()] == ["cert\nkey\n"]


def test_pools() -> None:
    one, two = Instance.at("10.0.0.1:80", "http"), Instance.at("10.0.0.2:80", "https")
    services = {"web": ServiceState((one,), one), "controller": ServiceState((two, Instance.at("10.0.0.2:80", "tcp")))}
    state = build(
        [http("a.test"), http("b.test", leader=True), http("c.test", service="controller"), http("d.test")], services
    )
    pools = {pool.key: pool for pool in state.pools}
    assert [key.name for key in pools] == ["http:controller", "http:web", "http:web:leader"]
    controller = pools[PoolKey("controller")]
    assert controller.platform and [backend.tls for backend in controller.backends] == [True]
    assert not pools[PoolKey("web", leader=True)].platform


def test_parts_of_the_platform_are_not_for_the_outside() -> None:
    services = {"discoverd": ServiceState((Instance.at("10.0.0.1:1111", "https"),))}
    routes = [http("a.test", service="discoverd"), Route(type="tcp", id="t", port=3000, service="blobstore")]
    state = build(routes, services, platform_services=frozenset({"blobstore"}))
    assert not state.http and not state.tcp and len(state.problems) == 2


labels = st.sampled_from(["a", "b", "c"])
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
domains = st.one_of(names, names.map("*.{}".format), st.just("*"))
segments = st.lists(labels, max_size=3).map(lambda parts: "/" + "".join(f"{part}/" for part in parts))


@given(st.lists(st.tuples(domains, segments), max_size=12), names, segments)
def test_the_prefix_tree_finds_what_the_rules_say(rules: list[tuple[str, str]], host: str, path: str) -> None:
    """HAProxy looks up `<host><path>/` by longest prefix, for each candidate domain in turn. That is the same."""
    state = build([http(domain, "/") for domain, _ in rules] + [http(*rule) for rule in rules], {})
    keys = {route.domain + route.path: route for route in state.http}
    parts = host.split(".")
    candidates = [host, *("*." + ".".join(parts[skip:]) for skip in range(len(parts))), "*"]
    found = None
    for candidate in candidates:
        prefixes = [key for key in keys if (candidate + path + "/").startswith(key)]
        if prefixes:
            found = keys[max(prefixes, key=len)]
            break
    assert found == match(state, host, path)
