"""The settings of the machine that builds: package mirrors, indexes, proxies, CA bundle.

Real networks have them, so builds honour them; but they belong to the machine and not to the images. During a build
they are offered to the chroot below /run (a tmpfs) and through the environment. Only layers of kind `machine` carry
them, for the images in which users' own builds run.

The parsing functions are pure; `find` reads the machine.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flynn.types.codec import sha512_256

CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# Every tool has its own name for "trust this bundle"; pip and node would otherwise trust only what they ship.
CA_VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "NPM_CONFIG_CAFILE",
)
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
NPM_SETTINGS = ("registry", "proxy", "https-proxy", "noproxy", "strict-ssl", "fetch-timeout", "fetch-retries")


@dataclass(frozen=True, slots=True)
class Machine:
    apt_sources: tuple[str, ...]  # one-line entries of every Debian suite the machine knows
    apt_options: tuple[str, ...]  # lines of apt.conf: how packages are fetched
    pip: Mapping[str, str]  # name as in pip.conf -> value
    npm: Mapping[str, str]  # name as in .npmrc -> value
    proxies: Mapping[str, str]
    ca_bundle: bytes  # empty = the machine has none

    def fingerprint(self) -> str:
        """Changes when a layer of kind machine would."""
        return sha512_256(repr((sorted(self.pip.items()), sorted(self.npm.items()))).encode() + self.ca_bundle)

    def environment(self, ca_bundle: str) -> dict[str, str]:
        """Variables that make tools use these settings; `ca_bundle` is where they find the bundle."""
        env = dict(self.proxies)
        if self.ca_bundle:
            env |= dict.fromkeys(CA_VARIABLES, ca_bundle)
        return env

    def pip_environment(self) -> dict[str, str]:
        return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in self.pip.items()}

    def npm_environment(self) -> dict[str, str]:
        """npm reads `npm_config_*` in any case; names of registries with a scope have no such form."""
        return {
            f"NPM_CONFIG_{name.upper().replace('-', '_')}": value
            for name, value in self.npm.items()
            if not name.startswith("@")
        }

    def pip_conf(self, ca_bundle: str) -> str:
        settings = dict(self.pip) | ({"cert": ca_bundle} if self.ca_bundle else {})
        return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in sorted(settings.items()))

    def npmrc(self, ca_bundle: str) -> str:
        settings = dict(self.npm) | ({"cafile": ca_bundle} if self.ca_bundle else {})
        return "".join(f"{name}={value}\n" for name, value in sorted(settings.items()))


NOWHERE = Machine(apt_sources=(), apt_options=(), pip={}, npm={}, proxies={}, ca_bundle=b"")
"""No settings: for images that are to run anywhere."""


def debian_sources(one_line: Iterable[str], deb822: Iterable[str]) -> tuple[str, ...]:
    """Package sources as one-line entries with the options dropped that name key files of this machine.

    `one_line` and `deb822` are the texts of `*.list` and `*.sources` files. Debian's own keys are in every Debian
    tree, so entries that need others (third parties) cannot be used in one and are left out by `for_suite`.
    """
    found: list[str] = []
    for text in one_line:
        for line in text.splitlines():
            entry = re.match(r"deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.+?)\s*(?:#.*)?$", line.strip())
            if entry:
                found.append("deb {} {} {}".format(*entry.groups()))
    for text in deb822:
        for stanza in re.split(r"\n\s*\n", text):
            fields = _deb822_fields(stanza)
            if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
                continue
            components = " ".join(fields.get("components", "").split())
            found += [
                f"deb {uri} {suite} {components}".rstrip()
                for uri in fields.get("uris", "").split()
                for suite in fields.get("suites", "").split()
            ]
    return tuple(dict.fromkeys(found))


def _deb822_fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0] in " \t":
            fields[name] = f"{fields.get(name, '')} {line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def for_suite(sources: Iterable[str], suite: str) -> tuple[str, ...]:
    """The entries of one Debian release with its updates and security suites."""
    suites = {suite, f"{suite}-updates", f"{suite}-security", f"{suite}/updates"}
    return tuple(s for s in sources if s.split()[2] in suites and "main" in s.split()[3:])


def fetch_options(apt_config_dump: str) -> tuple[str, ...]:
    """Of all apt settings those that say how to fetch: proxies, timeouts, checks. The index lists are apt's own."""
    return tuple(
        line
        for line in apt_config_dump.splitlines()
        if line.startswith("Acquire::")
        and not line.startswith(
            ("Acquire::IndexTargets", "Acquire::cdrom", "Acquire::Changelogs", "Acquire::https::CaInfo")
        )
        and not line.endswith(' "";')
    )


def index_settings(names: Iterable[str], *layers: Mapping[str, str]) -> dict[str, str]:
    """Pick the settings in `names`; later layers win. Paths of this machine mean nothing elsewhere and are dropped."""
    merged: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            if name in names or (name.startswith("@") and name.endswith(":registry")):
                portable = " ".join(word for word in value.split() if not word.startswith(("file:", "/")))
                if portable:
                    merged[name] = portable
                else:
                    merged.pop(name, None)
    return merged


def pip_settings(files: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Settings out of the texts of pip.conf files (weakest first) and the `PIP_*` variables, which win."""
    layers: list[dict[str, str]] = []
    for text in files:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
        layers += [dict(parser[section]) for section in ("global", "install") if parser.has_section(section)]
    variables = {k[4:].lower().replace("_", "-"): v for k, v in environ.items() if k.startswith("PIP_")}
    return index_settings(PIP_SETTINGS, *layers, variables)


def npmrc_settings(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.splitlines():
        if "=" in line and not line.lstrip().startswith(("#", ";", "//")):
            name, _, value = line.partition("=")
            found[name.strip()] = value.strip()
    return found


def npm_environment_settings(environ: Mapping[str, str]) -> dict[str, str]:
    prefix = "npm_config_"
    return {
        name[len(prefix) :].lower().replace("_", "-"): value
        for name, value in environ.items()
        if name.lower().startswith(prefix)
    }


def find() -> Machine:
    """Read the settings of this machine."""
    etc_apt = Path("/etc/apt")
    lists = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*.list"))]
    options = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    home = Path.home()
    return Machine(
        apt_sources=debian_sources(_texts(*lists), _texts(*sorted((etc_apt / "sources.list.d").glob("*.sources")))),
        apt_options=fetch_options(options),
        pip=pip_settings(
            _texts(Path("/etc/pip.conf"), home / ".pip/pip.conf", home / ".config/pip/pip.conf"), os.environ
        ),
        npm=index_settings(
            NPM_SETTINGS,
            *map(npmrc_settings, _texts(Path("/etc/npmrc"), Path("/usr/etc/npmrc"), home / ".npmrc")),
            npm_environment_settings(os.environ),
        ),
        proxies={name: os.environ[name] for name in PROXY_VARIABLES if os.environ.get(name)},
        ca_bundle=CA_BUNDLE.read_bytes() if CA_BUNDLE.is_file() else b"",
    )


def _texts(*paths: Path) -> list[str]:
    return [path.read_text() for path in paths if path.is_file()]
