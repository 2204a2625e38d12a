"""The clusters a user knows: `~/.flynnrc`, shared with the original client. See spec/cli section 3.

The file holds keys: it is written for its owner alone, and replaced as a whole, so that a full disk or a lost
connection never leaves half of it.
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flynn.cli.errors import CliError

LEGACY_PREFIX = "https://controller."


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    key: str = ""
    tls_pin: str = ""
    controller_url: str = ""
    git_url: str = ""
    image_url: str = ""
    docker_push_url: str = ""
    oauth_url: str = ""


KEYS: Sequence[tuple[str, str, bool]] = (
    ("Name", "name", True),
    ("OAuthURL", "oauth_url", False),
    ("Key", "key", False),
    ("TLSPin", "tls_pin", False),
    ("ControllerURL", "controller_url", True),
    ("GitURL", "git_url", True),
    ("ImageURL", "image_url", True),
    ("DockerPushURL", "docker_push_url", False),
)
"""Key in the file, field, and whether it is written even when it is empty."""


@dataclass(frozen=True, slots=True)
class Config:
    default: str = ""
    clusters: tuple[Cluster, ...] = ()
    path: Path = field(default=Path("/nonexistent"), compare=False)

    def find(self, name: str) -> Cluster | None:
        return next((cluster for cluster in self.clusters if cluster.name == name), None)

    def choose(self, name: str) -> Cluster:
        """The named cluster, else the default one, else the first."""
        if not self.clusters:
            raise CliError("no clusters configured")
        wanted = name or self.default
        if not wanted:
            return self.clusters[0]
        found = self.find(wanted)
        if found is None:
            raise CliError(f'unknown cluster "{wanted}"')
        return found

    def added(self, cluster: Cluster, *, force: bool) -> Config:
        """With one more cluster. `force` replaces the one it is in conflict with."""
        conflicts = [(other, reason) for other in self.clusters if (reason := _conflict(cluster, other))]
        if len(conflicts) > 1:
            raise CliError("The cluster name and/or URLs conflict with multiple existing clusters.")
        if conflicts and not force:
            raise CliError(conflicts[0][1])
        replaced = [other for other, _ in conflicts]
        return replace(self, clusters=(*(c for c in self.clusters if c not in replaced), cluster))

    def removed(self, name: str) -> Config:
        left = tuple(cluster for cluster in self.clusters if cluster.name != name)
        default = self.default
        if default == name or not left:
            default = left[0].name if left else ""
        return replace(self, clusters=left, default=default)


def _conflict(new: Cluster, old: Cluster) -> str:
    if new.name == old.name:
        return f'Cluster "{new.name}" already exists in ~/.flynnrc'
    for mine, theirs in (
        (new.git_url, old.git_url),
        (new.controller_url, old.controller_url),
        (new.docker_push_url, old.docker_push_url),
    ):
        if mine and mine == theirs:
            return f'A cluster with the URL "{mine}" already exists in ~/.flynnrc'
    return ""


def cluster_at(domain: str, name: str, key: str, pin: str) -> Cluster:
    """A cluster by its domain, with the URLs that follow from it. The domain may come as the controller's URL."""
    domain = domain.removeprefix(LEGACY_PREFIX)
    return Cluster(
        name=name,
        key=key,
        tls_pin=pin,
        controller_url=f"https://controller.{domain}",
        git_url=f"https://git.{domain}",
        image_url=f"https://images.{domain}",
    )


def home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or os.path.expanduser("~"))


def config_path(environ: Mapping[str, str]) -> Path:
    given = environ.get("FLYNNRC")
    return Path(given) if given else home(environ) / ".flynnrc"


def ca_path(environ: Mapping[str, str], cluster: str) -> Path:
    return home(environ) / ".flynn" / "ca-certs" / f"{cluster}.pem"


def load(path: Path) -> Config:
    """A file that does not exist is a configuration without clusters."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Config(path=path)
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """Keys are matched without regard to case; those we do not know are ignored."""
    try:
        document = {key.lower(): value for key, value in tomllib.loads(text).items()}
    except tomllib.TOMLDecodeError as error:
        raise CliError(f"{path}: {error}") from error
    clusters = []
    tables = document.get("cluster") or []
    if not isinstance(tables, list):
        raise CliError(f"{path}: cluster must be an array of tables")
    for item in tables:
        given = {str(key).lower(): value for key, value in item.items()}
        clusters.append(Cluster(**{name: str(given.get(key.lower(), "")) for key, name, _ in KEYS}))
    return Config(default=str(document.get("default", "")), clusters=tuple(clusters), path=path)


def render(config: Config) -> str:
    """The file's text, in the shape the original client writes."""
    if not config.clusters:
        return ""
    parts = [f"default = {_quoted(config.default)}\n"]
    for cluster in config.clusters:
        parts.append("\n[[cluster]]\n")
        for key, name, always in KEYS:
            value = getattr(cluster, name)
            if value or always:
                parts.append(f"  {key} = {_quoted(value)}\n")
    return "".join(parts)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string, once DEL is escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def save(config: Config) -> None:
    write_private(config.path, render(config))


def write_private(path: Path, text: str) -> None:
    """Write beside, then rename: whole or not at all, readable by the owner only."""
    target = path.resolve()
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}") from error
