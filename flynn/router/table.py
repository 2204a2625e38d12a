"""What the router is to serve, as one immutable value: routes, pools of backends, certificates, and what was refused.

Pure. `build` takes everything the controller and discoverd say and keeps what is usable; each route or certificate that
is not becomes a `Problem` and harms nobody else (spec/router defect D10). `render` turns the result into HAProxy's
terms. The matching rules of spec section 4 are fixed here as keys: `shop.example.net`, `*.example.net`, `*`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flynn.types.instance import Instance
from flynn.types.route import Route

CATCH_ALL = "*"
RESERVED_TCP_PORTS = (80, 443)

PUBLIC_SERVICES = frozenset({"controller", "gitreceive", "tarreceive", "status-web", "dashboard-web"})
"""Daemons of the platform that the outside may reach. To any other one the router would lend its own certificate, which
opens doors that are meant for parts of the platform only: a route to `discoverd` must not make everybody one."""

CheckPair = Callable[[str, str], str | None]
"""Says what is wrong with a certificate and its private key (PEM), or None."""

_LABEL = re.compile(r"(?:\*|[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*\Z")
_PATH = re.compile(r"/(?:[^\s/\\;#\x00-\x20\x7f]+/)*\Z")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}\Z")
_ADDRESS = re.compile(r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-fA-F:]+\]):\d{1,5}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """One address that serves. `tls` backends are daemons of the platform, which speak HTTPS with our certificates."""

    addr: str
    tls: bool = False
    app: str = ""
    job_id: str = ""

    @classmethod
    def of(cls, instance: Instance) -> Backend:
        meta = instance.meta
        return cls(
            instance.addr, instance.proto == "https", meta.get("FLYNN_APP_NAME", ""), meta.get("FLYNN_JOB_ID", "")
        )


@dataclass(frozen=True, slots=True, order=True)
class PoolKey:
    """What makes routes share a HAProxy backend: the service, and how requests are spread over its instances."""

    service: str
    kind: str = "http"  # http or tcp
    leader: bool = False
    sticky: bool = False
    close: bool = False  # no keep-alive towards the backends

    @property
    def name(self) -> str:
        """The name HAProxy knows it by; only characters it admits."""
        service = self.service
        if not _NAME.match(service):
            service = "x-" + hashlib.sha256(service.encode()).hexdigest()[:16]
        flags = [word for word in ("leader", "sticky", "close") if getattr(self, word)]
        return ":".join([self.kind, service, *flags])


@dataclass(frozen=True, slots=True)
class Pool:
    key: PoolKey
    backends: tuple[Backend, ...] = ()
    platform: bool = False  # its instances are daemons of ours: they speak TLS and the attach protocol


@dataclass(frozen=True, slots=True, order=True)
class HttpRoute:
    id: str
    domain: str  # lower case: an exact name, `*.suffix` or `*`
    path: str  # begins and ends with a slash
    port: int  # 0: the default ports; otherwise one of the additional ones
    pool: PoolKey
    certificate: str = ""  # fingerprint


@dataclass(frozen=True, slots=True, order=True)
class TcpRoute:
    id: str
    port: int
    pool: PoolKey


@dataclass(frozen=True, slots=True)
class Certificate:
    pem: str = field(repr=False)  # leaf, chain, private key

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.pem.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something that is not served as asked, and why."""

    route: str  # formatted id
    reason: str


@dataclass(frozen=True, slots=True)
class RoutingState:
    http: tuple[HttpRoute, ...] = ()
    tcp: tuple[TcpRoute, ...] = ()
    pools: tuple[Pool, ...] = ()
    certificates: Mapping[str, Certificate] = field(default_factory=dict)  # by fingerprint
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What discoverd says about one service."""

    instances: tuple[Instance, ...] = ()
    leader: Instance | None = None


def formatted_id(route: Route) -> str:
    return f"{route.type}/{route.id}"


def services_of(routes: Iterable[Route]) -> frozenset[str]:
    return frozenset(route.service for route in routes if route.service)


def certificate_of(route: Route) -> Certificate | None:
    """The route's pair as one PEM text; the legacy fields win when they are set."""
    cert, key = route.tls_cert, route.tls_key
    if not (cert or key) and route.certificate is not None:
        cert, key = route.certificate.cert, route.certificate.key
    if not cert.strip() or not key.strip():
        return None
    return Certificate(f"{cert.strip()}\n{key.strip()}\n")


def build(
    routes: Iterable[Route],
    services: Mapping[str, ServiceState],
    *,
    check_pair: CheckPair = lambda cert, key: None,
    additional_ports: frozenset[int] = frozenset(),
    platform_services: frozenset[str] = frozenset(),
    refused_ports: Mapping[int, str] | None = None,
) -> RoutingState:
    """Keep what can be served.

    `platform_services` are known to consist of daemons of ours even while none of them is up. `refused_ports` are TCP
    ports that cannot be bound here, with the reason. Of two routes with the same key the older one stays.
    """
    problems: list[Problem] = []
    http: dict[tuple[int, str, str], HttpRoute] = {}
    tcp: dict[int, TcpRoute] = {}
    certificates: dict[str, Certificate] = {}

    def refuse(route: Route, reason: str) -> None:
        problems.append(Problem(formatted_id(route), reason))

    # Roots first: a sub-path counts only below a domain that has one.
    for route in sorted(routes, key=lambda r: (r.path.strip("/") != "", r.created_at, r.id)):
        if not route.service:
            refuse(route, "has no service")
        elif route.service not in PUBLIC_SERVICES and _is_platform(route.service, services, platform_services):
            refuse(route, f"{route.service} is a part of the platform that is not for the outside")
        elif route.type == "tcp":
            pool = PoolKey(route.service, "tcp", leader=route.leader)
            if not 0 < route.port < 65536 or route.port in RESERVED_TCP_PORTS:
                refuse(route, f"cannot listen on port {route.port}")
            elif refused_ports and route.port in refused_ports:
                refuse(route, f"cannot listen on port {route.port}: {refused_ports[route.port]}")
            elif route.port in tcp:
                refuse(route, f"port {route.port} belongs to tcp/{tcp[route.port].id}")
            else:
                tcp[route.port] = TcpRoute(route.id, route.port, pool)
        elif route.type == "http":
            if isinstance(accepted := _http_route(route, http, additional_ports), str):
                refuse(route, accepted)
                continue
            if (pair := certificate_of(route)) is not None:
                cert, key = _split(route)
                if (wrong := check_pair(cert, key)) is not None:
                    refuse(route, f"the default certificate is served instead of its own: {wrong}")
                else:
                    certificates[pair.fingerprint] = pair
                    accepted = _with_certificate(accepted, pair.fingerprint)
            http[accepted.port, accepted.domain, accepted.path] = accepted
        else:
            refuse(route, f"unknown type {route.type!r}")

    keys = sorted({route.pool for route in http.values()} | {route.pool for route in tcp.values()})
    return RoutingState(
        http=tuple(sorted(http.values(), key=lambda r: (r.port, r.domain, r.path))),
        tcp=tuple(tcp[port] for port in sorted(tcp)),
        pools=tuple(_pool(key, services.get(key.service, ServiceState()), platform_services) for key in keys),
        certificates=dict(sorted(certificates.items())),
        problems=tuple(sorted(problems)),
    )


def _is_platform(service: str, services: Mapping[str, ServiceState], known: frozenset[str]) -> bool:
    return service in known or any(i.proto == "https" for i in services.get(service, ServiceState()).instances)


def _split(route: Route) -> tuple[str, str]:
    if route.tls_cert or route.tls_key or route.certificate is None:
        return route.tls_cert, route.tls_key
    return route.certificate.cert, route.certificate.key


def _with_certificate(route: HttpRoute, fingerprint: str) -> HttpRoute:
    return HttpRoute(route.id, route.domain, route.path, route.port, route.pool, fingerprint)


def _http_route(
    route: Route, known: Mapping[tuple[int, str, str], HttpRoute], additional_ports: frozenset[int]
) -> HttpRoute | str:
    """The route in our terms, or why it cannot be served."""
    domain = normal_domain(route.domain)
    path = normal_path(route.path)
    if domain is None:
        return f"{route.domain!r} is not a domain"
    if path is None:
        return f"{route.path!r} is not a path"
    if route.port and route.port not in additional_ports:
        return f"port {route.port} is not one of the additional ports"
    if (other := known.get((route.port, domain, path))) is not None:
        return f"the same domain and path belong to http/{other.id}"
    if path != "/" and (route.port, domain, "/") not in known:
        return f"{domain} has no route for /"
    pool = PoolKey(route.service, leader=route.leader, sticky=route.sticky, close=route.disable_keep_alives)
    return HttpRoute(route.id, domain, path, route.port, pool)


def normal_domain(domain: str) -> str | None:
    """Lower case, Unicode as punycode, no final dot; None if it can never match a request."""
    text = domain.strip().rstrip(".").lower()
    if not text.isascii():
        try:
            text = text.encode("idna").decode("ascii")
        except UnicodeError:
            return None
    return text if len(text) <= 253 and _LABEL.match(text) else None


def normal_path(path: str) -> str | None:
    text = path or "/"
    if not text.endswith("/"):
        text += "/"
    return text if _PATH.match(text) and len(text) <= 2000 else None


def _pool(key: PoolKey, service: ServiceState, platform_services: frozenset[str]) -> Pool:
    instances = service.instances
    if key.leader:
        instances = (service.leader,) if service.leader is not None else ()
    # One address may be registered twice (as tcp and http); it is still one backend, and the TLS one is the truer.
    usable: dict[str, Backend] = {}
    for instance in instances:
        backend = Backend.of(instance)
        if _ADDRESS.match(backend.addr) and (backend.addr not in usable or backend.tls):
            usable[backend.addr] = backend
    platform = key.service in platform_services or any(backend.tls for backend in usable.values())
    return Pool(key, tuple(sorted(usable.values())), platform)


def match(state: RoutingState, host: str, path: str, port: int = 0) -> HttpRoute | None:
    """The route that serves a request, by the rules of spec section 4, spelled out naively.

    HAProxy does this in production by map look-ups; this is the yardstick those are tested against.
    """
    by_domain: dict[str, list[HttpRoute]] = {}
    for route in state.http:
        if route.port == port:
            by_domain.setdefault(route.domain, []).append(route)
    name = host.partition(":")[0].lower().rstrip(".")
    labels = name.split(".")
    candidates = [name, *("*." + ".".join(labels[skip:]) for skip in range(len(labels))), CATCH_ALL]
    for domain in candidates:
        if domain not in by_domain:
            continue
        wanted = [segment for segment in path.split("/") if segment]
        fitting = [
            route
            for route in by_domain[domain]
            if (have := [segment for segment in route.path.split("/") if segment]) == wanted[: len(have)]
        ]
        return max(fitting, key=lambda route: len(route.path), default=None)
    return None
