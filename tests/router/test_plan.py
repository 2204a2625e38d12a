"""Going from any configuration to any other in small steps ends where starting with the other would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.router.plan import (
    AddCertificate,
    AddEntry,
    AddServer,
    Change,
    DropCertificate,
    DropEntry,
    Reload,
    RetireServer,
    ReviveServer,
    ServerRef,
    SetCertificate,
    SetEntry,
    accepted,
    commands,
    plan,
)
from flynn.router.render import DEFAULT_PEM, RAW_MAP, Rendered, Settings, render
from flynn.router.table import Certificate, ServiceState, build
from flynn.types.instance import Instance
from flynn.types.route import Certificate as RouteCertificate
from flynn.types.route import Route

SETTINGS = Settings(default_pair=Certificate("default"), cookie_key=bytes(32))


@dataclass
class Runtime:
    """A HAProxy that is nothing but its tables. It refuses what the real one refuses."""

    generation: str
    servers: dict[ServerRef, str] = field(default_factory=dict)
    retired: dict[ServerRef, str] = field(default_factory=dict)
    entries: dict[tuple[str, str], str] = field(default_factory=dict)
    certificates: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def on(cls, files: Rendered) -> Runtime:
        return cls(
            files.generation,
            {(b, n): options for b, group in files.servers.items() for n, options in group.items()},
            {},
            {(m, k): v for m, entries in files.maps.items() for k, v in entries.items()},
            dict(files.certificates),
            dict(files.names),
        )

    def tables(self) -> tuple[object, ...]:
        return self.generation, self.servers, self.entries, self.certificates, self.names

    def apply(self, change: Change, new: Rendered) -> Runtime:
        match change:
            case Reload():
                return Runtime.on(new)
            case AddServer(backend, name, options):
                assert (backend, name) not in self.servers and (backend, name) not in self.retired
                self.servers[backend, name] = options
            case ReviveServer(backend, name):
                self.servers[backend, name] = self.retired.pop((backend, name))
            case RetireServer(backend, name):
                self.retired[backend, name] = self.servers.pop((backend, name))
            case AddEntry(map, key, value):
                assert (map, key) not in self.entries
                self.entries[map, key] = value
            case SetEntry(map, key, value):
                assert (map, key) in self.entries
                self.entries[map, key] = value
            case DropEntry(map, key):
                del self.entries[map, key]
            case AddCertificate(file, name, pem):
                assert file not in self.certificates
                self.certificates[file], self.names[file] = pem, name
            case SetCertificate(file, pem):
                assert file in self.certificates
                self.certificates[file] = pem
            case DropCertificate(file):
                del self.certificates[file], self.names[file]
        self.check(new)
        return self

    def check(self, new: Rendered) -> None:
        """At no moment does a route lead to a pool that this worker does not have."""
        backends = set(new.servers)
        assert all(value in backends for (map, _), value in self.entries.items() if map.startswith("routes-"))


domains = st.sampled_from(["a.test", "b.test", "*.test", "*"])
services = st.sampled_from(["web", "api", "controller"])


@st.composite
def routes(draw: st.DrawFn) -> list[Route]:
    found = []
    for number in range(draw(st.integers(0, 5))):
        text = draw(st.sampled_from(["", "one", "two"]))
        found.append(
            Route(
                type="http",
                id=f"r{number}",
                domain=draw(domains),
                path=draw(st.sampled_from(["/", "/x/", "/x/y/"])),
                service=draw(services),
                sticky=draw(st.booleans()),
                leader=draw(st.booleans()),
                certificate=RouteCertificate(cert=text, key="key") if text else None,
            )
        )
    if draw(st.booleans()):
        found.append(Route(type="tcp", id="t", port=draw(st.sampled_from([3000, 3001])), service="web"))
    return found


@st.composite
def states(draw: st.DrawFn) -> Rendered:
    known = {}
    for service in ("web", "api", "controller"):
        proto = "https" if service == "controller" else "http"
        instances = tuple(
            Instance.at(f"10.0.0.{number}:80", proto) for number in draw(st.sets(st.integers(1, 3), max_size=3))
        )
        known[service] = ServiceState(instances, instances[0] if instances else None)
    state = build(draw(routes()), known, platform_services=frozenset({"controller"}))
    identity = draw(st.sampled_from(["identity", "renewed identity"]))
    return render(state, replace(SETTINGS, identity=identity, ca="authority"))


@given(st.lists(states(), min_size=2, max_size=6))
def test_small_steps_end_where_a_fresh_start_would(history: list[Rendered]) -> None:
    runtime = Runtime.on(history[0])
    old = history[0]
    for new in history[1:]:
        retiring: Iterable[ServerRef] = set(runtime.retired)
        for change in plan(old, new, tuple(retiring)):
            runtime = runtime.apply(change, new)
        assert runtime.tables() == Runtime.on(new).tables()
        assert plan(new, new) == ()
        old = new


@given(states(), states())
def test_every_step_is_one_haproxy_can_be_told(old: Rendered, new: Rendered) -> None:
    for change in plan(old, new):
        if isinstance(change, Reload):
            continue
        for command in commands(change):
            line, _, payload = command.partition("\n")
            assert len(line) < 8000 and "\n\n" not in payload


def rendered(*found: Route, instances: tuple[Instance, ...] = (), settings: Settings = SETTINGS) -> Rendered:
    return render(build(found, {"web": ServiceState(instances)}), settings)


ROUTE = Route(type="http", id="1", domain="a.test", service="web")
ONE, TWO = Instance.at("10.0.0.1:80", "http"), Instance.at("10.0.0.2:80", "http")


def test_a_replaced_backend_is_one_server_more_and_then_one_less() -> None:
    old, new = rendered(ROUTE, instances=(ONE,)), rendered(ROUTE, instances=(TWO,))
    added, gone = plan(old, new)
    assert isinstance(added, AddServer) and added.name == "10.0.0.2:80"
    assert gone == RetireServer("http:web", "10.0.0.1:80")
    assert plan(new, old, {("http:web", "10.0.0.1:80")})[0] == ReviveServer("http:web", "10.0.0.1:80")


def test_a_second_domain_of_a_service_is_one_map_entry() -> None:
    second = Route(type="http", id="2", domain="b.test", service="web")
    assert plan(rendered(ROUTE), rendered(ROUTE, second)) == (AddEntry("routes-0.map", "b.test/", "http:web"),)


def test_a_new_service_or_port_needs_a_reload() -> None:
    api = Route(type="http", id="2", domain="a.test", path="/x", service="api")
    tcp = Route(type="tcp", id="2", port=3000, service="web")
    for more in (api, tcp):
        (change,) = plan(rendered(ROUTE), rendered(ROUTE, more))
        assert isinstance(change, Reload)


def test_a_renewed_identity_is_one_certificate() -> None:
    old = replace(SETTINGS, identity="old", ca="ca")
    (change,) = plan(rendered(ROUTE, settings=old), rendered(ROUTE, settings=replace(old, identity="new")))
    assert change == SetCertificate("identity.pem", "new")


def test_a_new_default_pair_is_one_certificate() -> None:
    other = replace(SETTINGS, default_pair=Certificate("other"))
    assert plan(rendered(ROUTE), rendered(ROUTE, settings=other)) == (SetCertificate(DEFAULT_PEM, "other"),)


def test_the_raw_map_is_empty_without_platform_services() -> None:
    assert rendered(ROUTE, instances=(ONE,)).maps[RAW_MAP] == {}


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        ("\n", True),
        ("New server registered.\n\n", True),
        ("Server deleted.\n", True),
        ("Committing /x.pem\nSuccess!\n\n", True),
        ("Entry '/x.pem' deleted in crtlist '/l'!\n", True),
        ("No such backend.\n", False),
        ("Already exists a server with the same name in backend.\n", False),
        ("Committing /x.pem\nFailed!\n", False),
        ("unable to add certificate", False),
        ("entry not found.\n", False),
    ],
)
def test_answers(answer: str, fine: bool) -> None:
    assert accepted(answer) is fine
