"""From what is to be served to what HAProxy reads. Pure.

A `Rendered` keeps apart what HAProxy can be told while it runs (servers, map entries, certificates) and the skeleton,
whose change needs a reload. `files` writes all of it down below one directory.

Two things are less obvious:

- The HTTP front ends are TCP front ends that switch to HTTP as soon as the first request is in. That is for one kind of
  request: `POST` with a body and `Connection: upgrade` (how `flynn run` attaches). HAProxy's HTTP parser takes the
  `Upgrade` header off requests with a body, so such a connection to a service of the platform stays a TCP stream, to
  the `raw:` twin of its pool. The twin exists only for pools of our own daemons.
- A request is routed by looking up `<host><path>/` in a prefix tree (`map_beg`), whose keys are `<domain><path>`. The
  longest prefix is the longest path of the most specific domain, and a change of routes is a change of map entries.
  Requests that are not written as the map has them, and wildcards, are matched by `route.lua` on the same maps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources

from flynn.router.paths import CONFIG
from flynn.router.sticky import cookie_value
from flynn.router.table import CATCH_ALL, Backend, Certificate, HttpRoute, Pool, PoolKey, RoutingState

BASE = "@BASE@"  # stands for the directory of the files
RUN = "@RUN@"  # stands for the directory of the sockets
HASH = "@HASH@"

DEFAULT_PEM = "default.pem"
IDENTITY_PEM = "identity.pem"
CA_PEM = "ca.pem"
CRT_LIST = "crt-list.txt"
STICKY_READ = "sticky-read.map"
STICKY_WRITE = "sticky-write.map"
RAW_MAP = "raw.map"
SCRIPT = "route.lua"

MAX_PAGE_BYTES = 15_000  # an error page has to fit into one buffer of HAProxy

# Spec 5.2: what the original offers for TLS 1.2. TLS 1.3 brings its own suites.
CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)

_LUA = resources.files("flynn.router").joinpath(SCRIPT).read_text()

NOT_FOUND = "Not Found\n"
UNAVAILABLE = b"Service Unavailable\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What does not change while the router runs, the identity's renewal excepted."""

    listen_ip: str = ""  # empty: all IPv4 addresses
    http_port: int = 8080  # 0: no plain HTTP on a default port
    https_port: int = 4433
    additional_http_ports: tuple[int, ...] = ()
    additional_https_ports: tuple[int, ...] = ()
    proxy_protocol: bool = False  # then every HTTP and HTTPS connection has to begin with a PROXY header
    default_pair: Certificate | None = None  # without it, connections for names without a certificate are refused
    cookie_key: bytes = field(default=bytes(32), repr=False)
    unavailable_page: bytes = b""  # HTML; empty: the plain text
    identity: str = field(default="", repr=False)  # PEM: our certificate and key for platform services
    ca: str = ""  # PEM: who signs theirs
    max_connections: int = 20_000
    threads: int = 2
    busy_requests_per_second: int = 200  # above this rate requests are not logged one by one, and not repeated


@dataclass(frozen=True, slots=True)
class Rendered:
    """A configuration in parts. `skeleton` holds a line `#servers <backend>` where the servers belong."""

    skeleton: str
    servers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # backend -> name -> address and options
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # file -> key -> value
    certificates: Mapping[str, str] = field(default_factory=dict, repr=False)  # file -> PEM
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # certificate file -> options, and the server name it is shown for
    script: str = ""
    pages: Mapping[str, bytes] = field(default_factory=dict)  # file -> raw HTTP response
    ca: str = ""

    @property
    def generation(self) -> str:
        """Names the skeleton; HAProxy tells it when asked which configuration it runs."""
        parts = [self.skeleton, self.script, self.ca, *(f"{name}{page!r}" for name, page in sorted(self.pages.items()))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def text(self) -> str:
        lines: list[str] = []
        for line in self.skeleton.splitlines():
            if line.startswith("#servers "):
                backend = line.removeprefix("#servers ")
                lines += [f"    server {name} {rest}" for name, rest in sorted(self.servers[backend].items())]
            else:
                lines.append(line.replace(HASH, self.generation))
        return "\n".join(lines) + "\n"

    def crt_list(self) -> str:
        lines = [f"{BASE}/{DEFAULT_PEM} {_NO_NAME}"] if DEFAULT_PEM in self.certificates else []
        return "".join(line + "\n" for line in [*lines, *(f"{BASE}/{f} {n}" for f, n in sorted(self.names.items()))])

    def files(self, base: str, run: str) -> dict[str, bytes]:
        """Every file by its name, with the two directories filled in."""

        def placed(text: str) -> bytes:
            return text.replace(BASE, base).replace(RUN, run).encode()

        files = {CONFIG: placed(self.text()), CRT_LIST: placed(self.crt_list()), SCRIPT: placed(self.script)}
        for name, entries in self.maps.items():
            files[name] = "".join(f"{key} {value}\n" for key, value in sorted(entries.items())).encode()
        files |= {name: pem.encode() for name, pem in self.certificates.items()}
        files |= dict(self.pages)
        if self.ca:
            files[CA_PEM] = self.ca.encode()
        return files


#: Clients of these are not offered HTTP/2: HAProxy 2.6 ends a stream in good order when the backend died between two
#: chunks of its answer. git takes half an answer for a whole one then, and waits for ever. By HTTP/1.1 it is told.
_HTTP_1_ONLY = frozenset({"gitreceive"})
_NO_NAME = "default.invalid"  # keeps HAProxy from showing the default pair for every name inside its certificate


def routes_map(port: int) -> str:
    return f"routes-{port}.map"


def server_name(backend: Backend) -> str:
    """Unique within a pool, and telling: the address."""
    name = backend.addr.replace("[", "").replace("]", "")
    return name + (".tls" if backend.tls else "")


def render(state: RoutingState, settings: Settings) -> Rendered:
    pools = {pool.key: pool for pool in state.pools}
    with_twin = {key for key, pool in pools.items() if pool.platform and key.kind == "http" and settings.identity}
    servers: dict[str, Mapping[str, str]] = {}
    for key, pool in pools.items():
        servers[key.name] = _servers(pool, settings)
        if key in with_twin:
            servers[_twin(key)] = servers[key.name]
    ports = _http_ports(settings)
    certificates, names = _certificates(state, settings)
    return Rendered(
        skeleton="\n".join(_skeleton(state, settings, with_twin)) + "\n",
        servers=servers,
        maps={
            **{
                routes_map(port): {r.domain + r.path: r.pool.name for r in state.http if r.port == port}
                for port in ports
            },
            RAW_MAP: {r.domain + r.path: _twin(r.pool) for r in state.http if r.pool in with_twin and r.port == 0},
            **_sticky_maps(state, settings),
        },
        certificates=certificates,
        names=names,
        script=_script(settings),
        pages={"503.http": _page(settings)},
        ca=settings.ca,
    )


def _twin(key: PoolKey) -> str:
    return "raw:" + key.name


def _http_ports(settings: Settings) -> list[int]:
    """Port classes: 0 for the default ports together, then each additional one."""
    return [0, *sorted({*settings.additional_http_ports, *settings.additional_https_ports})]


def _servers(pool: Pool, settings: Settings) -> dict[str, str]:
    found = {}
    for backend in pool.backends:
        options = ""
        if backend.tls:
            if not settings.identity:
                continue  # without a certificate of ours it would refuse us anyway
            name = f"{pool.key.service}.discoverd"
            options = (
                f" ssl verify required ca-file {BASE}/{CA_PEM} crt {BASE}/{IDENTITY_PEM}"
                f" verifyhost {name} sni str({name}) ssl-min-ver TLSv1.2"
            )
        if pool.key.kind == "http":
            # 64 idle connections per thread; a backend of ours closes idle ones after 75 s, so be first.
            options += " pool-max-conn 64 pool-purge-delay 30s"
        found[server_name(backend)] = backend.addr + options
    return found


def _sticky_maps(state: RoutingState, settings: Settings) -> dict[str, dict[str, str]]:
    backends = {backend for pool in state.pools if pool.key.sticky for backend in pool.backends}
    cookies = {server_name(backend): cookie_value(settings.cookie_key, backend.addr) for backend in backends}
    return {STICKY_READ: {cookie: name for name, cookie in cookies.items()}, STICKY_WRITE: cookies}


def _certificates(state: RoutingState, settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """The PEM files, and the name each is shown for. See spec 5.2: only root routes count."""
    roots = {route.domain: route for route in _certified_first(state) if route.path == "/"}
    shown: dict[str, str] = {}  # server name -> PEM
    for domain, route in roots.items():
        if not route.certificate or domain == CATCH_ALL:
            continue  # HAProxy cannot tell "no name" from "unknown name": both get the default pair
        pem = state.certificates[route.certificate].pem
        shown[domain] = pem
        if domain.startswith("*.") and domain[2:] not in roots:
            shown[domain[2:]] = pem  # a wildcard also matches its own base
    for domain, route in roots.items():
        parent = "*." + domain.partition(".")[2]
        if not route.certificate and parent in shown and settings.default_pair is not None:
            shown[domain] = settings.default_pair.pem

    certificates: dict[str, str] = {}
    names: dict[str, str] = {}
    if settings.default_pair is not None:
        certificates[DEFAULT_PEM] = settings.default_pair.pem
    if settings.identity:
        certificates[IDENTITY_PEM] = settings.identity
    for name, pem in sorted(shown.items()):
        plain = name in roots and roots[name].pool.service in _HTTP_1_ONLY
        file = f"{name.replace('*', '_')}.{Certificate(pem).fingerprint}{'.h1' if plain else ''}.pem"
        certificates[file], names[file] = pem, f"[alpn http/1.1] {name}" if plain else name
    return certificates, names


def _certified_first(state: RoutingState) -> list[HttpRoute]:
    """All HTTP routes, those of the default ports last, so that they win the server name."""
    return sorted(state.http, key=lambda route: (route.port == 0, route.port, route.domain))


def _script(settings: Settings) -> str:
    """`route.lua`, told which maps there are."""
    files = ", ".join(f'"{BASE}/{routes_map(port)}"' for port in _http_ports(settings))
    return _LUA.replace("@MAPS@", files)


def _page(settings: Settings) -> bytes:
    page = settings.unavailable_page
    kind = b"text/html" if page else b"text/plain"
    body = page or UNAVAILABLE
    head = (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: %s; charset=utf-8\r\n"
        b"Content-Length: %d\r\nCache-Control: no-cache\r\n\r\n"
    )
    return head % (kind, len(body)) + body


def _skeleton(state: RoutingState, settings: Settings, with_twin: set[PoolKey]) -> Iterator[str]:
    yield from _global(settings)
    yield from _defaults()
    for port in _http_ports(settings):
        yield from _http_frontend(port, settings)
    for tcp in state.tcp:
        yield from _tcp_frontend(tcp.port, tcp.pool, settings)
    yield from ("backend unavailable from http_backend", "")
    if settings.identity:
        # Keeps certificate and authority loaded, so that servers added at run time can refer to them.
        options = f"ssl verify required ca-file {BASE}/{CA_PEM} crt {BASE}/{IDENTITY_PEM}"
        yield from ("backend identity from tcp_backend", f"    server identity 127.0.0.1:1 disabled {options}", "")
    for pool in state.pools:
        yield from _backend(pool)
        if pool.key in with_twin:
            yield from (
                f"backend {_twin(pool.key)} from tcp_backend",
                "    timeout connect 5s",
                f"#servers {_twin(pool.key)}",
                "",
            )


def _global(settings: Settings) -> Iterator[str]:
    yield from (
        "global",
        f"    description {HASH}",
        f"    stats socket {RUN}/admin.sock mode 600 level admin expose-fd listeners",
        "    stats timeout 1m",
        f"    log {RUN}/log.sock len 4096 format raw local0",
        f"    nbthread {settings.threads}",
        f"    maxconn {settings.max_connections}",
        # A worker that was replaced lives on for its open streams: at most this long, at most this many of them.
        "    hard-stop-after 24h",
        "    mworker-max-reloads 25",
        # The headers of a request have to fit into one buffer, less what we may add. Twice as much costs 5 % speed.
        "    tune.bufsize 16384",
        "    tune.maxrewrite 1024",
        "    tune.http.maxhdr 256",
        "    tune.h2.max-concurrent-streams 250",
        "    tune.ssl.cachesize 5000",
        "    ssl-default-bind-options ssl-min-ver TLSv1.2",
        f"    ssl-default-bind-ciphers {CIPHERS}",
        "    ssl-default-bind-curves X25519:P-256",
        "    ssl-server-verify required",
        f"    lua-load-per-thread {BASE}/{SCRIPT}",
        "",
    )


def _defaults() -> Iterator[str]:
    yield from (
        "defaults base",
        "    log global",
        "    option dontlognull",
        "    option clitcpka",
        "    option srvtcpka",
        "    clitcpka-idle 180s",
        "    clitcpka-intvl 60s",
        # A machine without power says nothing: streams of its jobs are ended after 11 s, about when it is given up.
        "    srvtcpka-idle 5s",
        "    srvtcpka-intvl 2s",
        "    srvtcpka-cnt 3",
        "    timeout connect 1s",
        "    timeout queue 1s",
        "    timeout client 5m",
        "    timeout http-request 60s",
        "    timeout http-keep-alive 5m",
        "    timeout server 10m",  # how long a backend may take to begin its answer: gitreceive answers late
        "    timeout tunnel 24h",  # web sockets, `flynn run`: idle for hours is normal
        *(f"    errorfile {code} {BASE}/503.http" for code in (500, 502, 503, 504)),
        "",
        "defaults http_frontend from base",
        "    mode tcp",
        "    option abortonclose",  # in front end and backend both: only then a client that left is noticed
        "    option http-no-delay",
        # Method, backend, server, bytes and so on are for flynn.router.accesslog, which reads them by position.
        '    log-format "%[var(txn.start)] %Tt %ci:%cp %ft %b %s %B %ts %rc %[var(txn.status)] %[var(txn.id)]'
        ' %[var(txn.method)] %[var(txn.host)] %[var(txn.target)]"',
        "",
        "defaults tcp_frontend from base",
        "    mode tcp",
        '    log-format "- %Tt %ci:%cp %ft %b %s %B %ts %rc - - - - -"',
        "    timeout client 24h",
        "",
        "defaults http_backend from base",
        "    mode http",
        "    option http-no-delay",
        # Not `random`: to HAProxy 2.6 servers added at run time all have the same place in its draw, so that of six
        # jobs two got all requests.
        "    balance leastconn",
        "    option abortonclose",
        "    option redispatch 1",
        "    retries 3",
        # A request is repeated elsewhere only if no backend can have acted on it, or if it is a GET: a connection
        # that had been idle may close just when it is used again.
        "    retry-on conn-failure empty-response",
        "    http-reuse safe",
        "    http-request set-timeout server 24h if { req.hdr(accept) -m sub text/event-stream }",
        "",
        "defaults tcp_backend from base",
        "    mode tcp",
        "    balance leastconn",
        "    option redispatch 1",
        "    retries 3",
        "    timeout server 24h",
        "",
    )


def _http_frontend(port: int, settings: Settings) -> Iterator[str]:
    plain = [settings.http_port] if port == 0 else [p for p in settings.additional_http_ports if p == port]
    secure = [settings.https_port] if port == 0 else [p for p in settings.additional_https_ports if p == port]
    address = settings.listen_ip or "*"
    proxy = " accept-proxy" if settings.proxy_protocol else ""
    strict = "" if settings.default_pair is not None else " strict-sni"
    routes = f"{BASE}/{routes_map(port)}"
    found = "{ var(txn.pool) -m found }"
    busy = "{ var(txn.busy) -m found }"

    yield f"frontend {'http' if port == 0 else f'http.{port}'} from http_frontend"
    yield from (f"    bind {address}:{p}{proxy}" for p in plain if p)
    yield from (
        f"    bind {address}:{p} ssl crt-list {BASE}/{CRT_LIST}{strict} alpn h2,http/1.1{proxy}" for p in secure if p
    )
    yield from (
        # The first request decides whether the connection is HTTP (see the module's text); later ones find it decided.
        "    tcp-request inspect-delay 10s",
        "    tcp-request content accept if { var(sess.http) -m found }",
        "    tcp-request content set-var(txn.host) req.hdr(host),field(1,:),lower,rtrim(.) if METH_POST",
        f"    tcp-request content set-var(txn.raw) path,bytes(0,{_LONGEST_KEY}),concat(,,/) if METH_POST"
        " { req.hdr(connection),lower -m sub upgrade }",
        f"    tcp-request content set-var(txn.raw) var(txn.host),concat(,txn.raw),map_beg({BASE}/{RAW_MAP},none)"
        " if { var(txn.raw) -m found }",
        "    tcp-request content accept if { var(txn.raw) -m beg raw: }",
        "    tcp-request content set-var(sess.http) bool(true)",
        "    tcp-request content switch-mode http",
        # What identifies the request, here and in the log.
        "    http-request set-var(txn.start) date(0,ms)",
        "    http-request set-var(txn.host) req.hdr(host),field(1,:),lower,rtrim(.)",
        # Under load, what a single request does not need is left out: its line in the log, the copy for a retry.
        f"    http-request set-var(txn.busy) bool(true) if {{ fe_req_rate gt {settings.busy_requests_per_second} }}",
        f"    http-request set-log-level silent if {busy}",
        f"    http-request set-var(txn.target) path if !{busy}",
        f"    http-request set-var(txn.method) method if !{busy}",
        "    http-request deny deny_status 400 if !{ req.fhdr_cnt(host) eq 1 } !HTTP_1.0",
        "    http-request return status 200 if METH_OPTIONS { url * }",
        "    http-request set-header X-Request-Id %[uuid()]"
        " if !{ req.fhdr(X-Request-Id) -m reg ^[A-Za-z0-9+/=-]{20,200}$ }",
        f"    http-request set-var(txn.id) req.fhdr(X-Request-Id) if !{busy}",
        # Which pool. Most requests are written just as the map has them; the script finds the others.
        f"    http-request set-var(txn.pool) base,concat(,,/),map_beg({routes}) if !{{ path -m sub // % }}",
        f"    http-request lua.flynn_route {_http_ports(settings).index(port) + 1} if !{found}",
    )
    yield (
        f'    http-request return status 404 content-type "text/plain; charset=utf-8" string "{NOT_FOUND.strip()}\\n"'
        f" if !{found}"
    )
    # Here `Connection` is left only if it names more than "close" or "keep-alive".
    yield (
        "    http-request lua.flynn_hop_by_hop if { req.fhdr_cnt(connection) gt 0 } !{ req.hdr(connection) -i upgrade }"
    )
    # What the backend is told. One line of a forwarding header is extended; several are added to.
    for header, value in (
        ("X-Forwarded-For", "%[src]"),
        ("X-Forwarded-Proto", "%[ssl_fc,iif(https,http)]"),
        ("X-Forwarded-Port", "%[dst_port]"),
    ):
        one = f"{{ req.fhdr_cnt({header}) eq 1 }}"
        yield f'    http-request set-header {header} "%[req.fhdr({header})], {value}" if {one}'
        yield f"    http-request add-header {header} {value} if !{one}"
    yield from (
        "    http-request set-header X-Request-Start %[var(txn.start)]",
        "    http-request del-header TE",
        f"    http-request disable-l7-retry if {busy} || !METH_GET",
        f"    http-after-response set-var(txn.status) status if !{busy}",
        "    use_backend %[var(txn.raw)] if { var(txn.raw) -m beg raw: }",
        "    use_backend %[var(txn.pool)]",
        "    default_backend unavailable",
        "",
    )


_LONGEST_KEY = 4000  # characters of a path that can matter for routing


def _tcp_frontend(port: int, pool: PoolKey, settings: Settings) -> Iterator[str]:
    yield from (
        f"frontend tcp.{port} from tcp_frontend",
        f"    bind {settings.listen_ip or '*'}:{port}",
        f"    default_backend {pool.name}",
        "",
    )


def _backend(pool: Pool) -> Iterator[str]:
    key = pool.key
    yield f"backend {key.name} from {key.kind}_backend"
    if pool.platform:
        yield "    timeout connect 5s"  # covers the TLS handshake with a Python daemon
        # Meant for parts of the platform; our certificate would make everybody one.
        yield "    http-request return status 404 if { path,url_dec -m str /metrics }"
    if key.close:
        yield "    option http-server-close"
    if key.sticky:
        yield from (
            "    http-request set-var(txn.cookie) req.cook(_backend)",
            f"    http-request set-var(txn.server) var(txn.cookie),map_str({BASE}/{STICKY_READ})",
            "    use-server %[var(txn.server)] if { var(txn.server) -m found }",
            f"    http-response set-var(txn.written) srv_name,map_str({BASE}/{STICKY_WRITE})",
        )
        due = "{ var(txn.written) -m found } !{ var(txn.written),strcmp(txn.cookie) eq 0 }"
        attributes = "Path=/; HttpOnly; SameSite=Lax"
        for condition, extra in (("!{ ssl_fc }", ""), ("{ ssl_fc }", "; Secure")):
            yield (
                f'    http-response add-header Set-Cookie "_backend=%[var(txn.written)]; {attributes}{extra}"'
                f" if {due} {condition}"
            )
    yield f"#servers {key.name}"
    yield ""
