"""flynn-router: parses its configuration, then is either the launcher or the control daemon.

Started as `flynn-router` it is the launcher, which runs HAProxy and `flynn-router --control` beside each other.
"""

from __future__ import annotations

import argparse
import base64
import logging
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flynn.router import launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flynn.identity import Identity
    from flynn.router.render import Settings
    from flynn.router.table import Certificate

log = logging.getLogger(__name__)

CONTROL = "--control"
MAX_CONNECTIONS = 20_000
SPARE_DESCRIPTORS = 1_000  # for sockets that are not connections of clients or backends
PAGE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Config:
    settings: Settings
    api_port: int  # -api-port, PORT, 5000
    api_ip: str  # LISTEN_IP
    controller_key: str  # CONTROLLER_KEY, else AUTH_KEY; the first of a list
    controller_url: str  # CONTROLLER_URL, for tests
    state: Path  # ROUTER_STATE_DIR, /data, /var/lib/flynn-router
    run: Path  # ROUTER_RUN_DIR
    haproxy: str  # ROUTER_HAPROXY
    environment: Mapping[str, str]


def arguments() -> argparse.ArgumentParser:
    """The flags of the original, single dash included; those that are not ports of HTTP have no effect here."""
    parser = argparse.ArgumentParser(prog="flynn-router", allow_abbrev=False)
    parser.add_argument("-http-port", "--http-port", type=int, default=8080)
    parser.add_argument("-https-port", "--https-port", type=int, default=4433)
    parser.add_argument("-tcp-ip", "--tcp-ip", default="")
    parser.add_argument("-tcp-range-start", "--tcp-range-start", type=int, default=3000)
    parser.add_argument("-tcp-range-end", "--tcp-range-end", type=int, default=3500)
    parser.add_argument("-tls-cert", "--tls-cert", default="")
    parser.add_argument("-tls-key", "--tls-key", default="")
    parser.add_argument("-api-port", "--api-port", default="")
    parser.add_argument(CONTROL, action="store_true", help=argparse.SUPPRESS)
    return parser


def configure(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Raises ConfigError, naming the flag or variable."""
    from flynn.daemon import ConfigError
    from flynn.router.render import MAX_PAGE_BYTES, Settings

    flags = arguments().parse_args(argv)
    try:
        key = base64.b64decode(environ.get("COOKIE_KEY", ""), validate=True)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError("COOKIE_KEY must be 32 bytes in base64")
    https_port = _port(environ, "DEFAULT_HTTPS_PORT", flags.https_port)
    if https_port == 0:
        raise ConfigError("DEFAULT_HTTPS_PORT cannot be 0")
    page = _fetched_page(environ.get("ERROR_503_PAGE_URL", ""))
    if len(page) > MAX_PAGE_BYTES:
        log.error("ERROR_503_PAGE_URL: the page is too big", extra={"bytes": len(page), "limit": MAX_PAGE_BYTES})
        page = b""
    if environ.get("LEGACY_TLS") == "true":
        log.warning("LEGACY_TLS has no effect: TLS 1.2 is the oldest version there is")
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    settings = Settings(
        listen_ip=_listen_ip(environ),
        http_port=_port(environ, "DEFAULT_HTTP_PORT", flags.http_port),
        https_port=https_port,
        additional_http_ports=_ports(environ, "ADDITIONAL_HTTP_PORTS"),
        additional_https_ports=_ports(environ, "ADDITIONAL_HTTPS_PORTS"),
        proxy_protocol=environ.get("PROXY_PROTOCOL") == "true",
        default_pair=_default_pair(flags, environ),
        cookie_key=key,
        unavailable_page=page,
        max_connections=max(500, min(MAX_CONNECTIONS, (hard_limit - SPARE_DESCRIPTORS) // 2)),
        threads=min(2, os.cpu_count() or 1),
    )
    return Config(
        settings=settings,
        api_port=_port({"PORT": flags.api_port or environ.get("PORT", "")}, "PORT", 5000),
        api_ip=_listen_ip(environ),
        controller_key=(environ.get("CONTROLLER_KEY") or environ.get("AUTH_KEY", "")).partition(",")[0],
        controller_url=environ.get("CONTROLLER_URL", ""),
        state=state_directory(environ),
        run=launcher.run_directory(),
        haproxy=environ.get("ROUTER_HAPROXY") or "haproxy",
        environment=environ,
    )


def state_directory(environ: Mapping[str, str]) -> Path:
    if named := environ.get("ROUTER_STATE_DIR"):
        return Path(named)
    return Path("/data") if Path("/data").is_dir() else Path("/var/lib/flynn-router")


def _listen_ip(environ: Mapping[str, str]) -> str:
    address = environ.get("LISTEN_IP", "")
    return "" if address == "0.0.0.0" else address


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    from flynn.daemon import ConfigError

    text = environ.get(name) or str(default)
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(f"{name} is not a port number: {text!r}")
    return int(text)


def _ports(environ: Mapping[str, str], name: str) -> tuple[int, ...]:
    return tuple(_port({name: text}, name, 0) for text in environ.get(name, "").split(",") if text)


def _default_pair(flags: argparse.Namespace, environ: Mapping[str, str]) -> Certificate | None:
    from flynn.daemon import ConfigError
    from flynn.router.pairs import check_pair
    from flynn.router.table import Certificate

    cert, key = environ.get("TLSCERT", ""), environ.get("TLSKEY", "")
    if flags.tls_cert:
        try:
            cert, key = Path(flags.tls_cert).read_text(), Path(flags.tls_key).read_text()
        except OSError as error:
            raise ConfigError(f"-tls-cert, -tls-key: {error}") from error
    if not cert or not key:
        return None
    if (wrong := check_pair(cert, key)) is not None:
        raise ConfigError(f"the default certificate cannot be used: {wrong}")
    return Certificate(f"{cert.strip()}\n{key.strip()}\n")


def _fetched_page(url: str) -> bytes:
    if not url:
        return b""
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=PAGE_SECONDS) as answer:
            return answer.read(1_000_000) if answer.status == 200 else b""
    except (OSError, ValueError) as error:
        log.error("ERROR_503_PAGE_URL: cannot fetch the page", extra={"error": str(error)})
        return b""


class CurrentSettings:
    """The settings with the identity as it is on disk now."""

    def __init__(self, settings: Settings, identity: Identity) -> None:
        self._settings = settings
        self._identity = identity
        self._stamp: tuple[int, int] | None = None

    def __call__(self) -> Settings:
        if (stamp := self._identity.stamp()) != self._stamp:
            directory = self._identity.directory
            pem = f"{(directory / 'cert.pem').read_text()}\n{(directory / 'key.pem').read_text()}\n"
            self._settings = replace(self._settings, identity=pem, ca=self._identity.ca_path.read_text())
            self._stamp = stamp
        return self._settings


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    from flynn.aio.supervisor import TaskSet, supervisor
    from flynn.controller import client as controller_client
    from flynn.discoverd.client import Discoverd
    from flynn.discoverd.instances import instance_from_environment
    from flynn.http.server import listen
    from flynn.identity import Identity
    from flynn.router.accesslog import receiving
    from flynn.router.api import router_api
    from flynn.router.control import Control
    from flynn.router.haproxy import Haproxy
    from flynn.router.paths import Paths
    from flynn.router.sources import ControllerRoutes

    identity = Identity.from_environment(config.environment)
    haproxy = Haproxy(Paths(config.state, config.run), config.haproxy)
    url = config.controller_url or controller_client.INSIDE_URL
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(receiving(haproxy.paths.log))
        registry = await stack.enter_async_context(Discoverd.from_environment(config.environment))
        controller = await stack.enter_async_context(controller_client.inside(config.controller_key, identity, url=url))
        watches = await stack.enter_async_context(TaskSet())
        spawn = await stack.enter_async_context(supervisor())
        control = Control(
            haproxy,
            CurrentSettings(config.settings, identity),
            ControllerRoutes(controller),
            registry,
            haproxy.paths.known,
        )
        control.start(spawn, watches)
        await control.caught_up()
        await stack.enter_async_context(
            listen(router_api(control), "", 0, tls=identity, sock=_listening(config.api_ip, config.api_port))
        )
        api = instance_from_environment(config.environment, config.api_port, "https")
        await stack.enter_async_context(registry.registered("router-api", api))
        ports = (config.settings.http_port, *config.settings.additional_http_ports)
        if plain := next((port for port in ports if port), 0):
            http = instance_from_environment(config.environment, plain, "http")
            await stack.enter_async_context(registry.registered("router-http", http))
        yield


def _listening(address: str, port: int) -> socket.socket:
    """The API's socket: during a deployment the old and the new router of a host listen side by side."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((address or "0.0.0.0", port))
    listener.listen(512)
    listener.setblocking(False)
    return listener


def _control(argv: Sequence[str]) -> None:
    from flynn.daemon import ConfigError, run
    from flynn.log import configure as configure_log

    configure_log("router")
    try:
        config = configure(argv, os.environ)
    except ConfigError as error:
        print(f"router: {error}", file=sys.stderr, flush=True)
        sys.exit(launcher.EXIT_CONFIG)
    os.environ.pop("TLSKEY", None)
    run("router", lambda: running(config))


def main() -> None:
    argv = sys.argv[1:]
    if CONTROL in argv:
        return _control(argv)
    arguments().parse_args(argv)
    from flynn.router.paths import Paths

    paths = Paths(state_directory(os.environ), launcher.run_directory())
    paths.create()
    drain = float(os.environ.get("ROUTER_DRAIN_SECONDS") or launcher.DRAIN_SECONDS)
    sys.exit(launcher.launch(launcher.control_command(argv), paths.config, paths.master, drain_seconds=drain))


if __name__ == "__main__":
    main()
