"""What a build is told by whoever started it: everything comes in the environment of the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ENV_DIR_COOKIE = ".ENV_DIR_bdca46b87df0537eaefe79bb632d37709ff1df18"
"""Directory in the incoming tar that holds the app's configuration, one file per variable."""

SLUG_UID = 5000
SLUG_USER = "flynn"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

CA_BUNDLE_VARIABLES = (
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "NPM_CONFIG_CAFILE",
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
)

PASSED_ON = (
    "STACK",
    "CF_STACK",
    "SOURCE_VERSION",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
PASSED_ON_PREFIXES = ("PIP_", "NPM_CONFIG_", "npm_config_")
"""What buildpacks see of the job's environment: never the signed URLs."""

CLONE_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""What of the app's own configuration holds for cloning a custom buildpack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    work: Path  # TMPDIR: everything is built below it
    buildpacks: Path  # BUILDPACKS_DIR: the built-in ones, in the order of their names
    app_link: Path | None  # APP_LINK: becomes a symbolic link to the source; empty = none
    uid: int  # SLUG_UID: buildpacks run as it; 0 = do not change (only root can)
    slug_put_url: str  # SLUG_PUT_URL: where the slug goes
    result_put_url: str  # RESULT_PUT_URL: where the description of the slug goes
    cache_get_url: str  # BUILD_CACHE_GET_URL, empty = no cache
    cache_put_url: str  # BUILD_CACHE_PUT_URL, empty = no cache
    ca_pem: str  # BLOBSTORE_CA: the authority the blobstore's certificate is checked against
    buildpack_url: str  # BUILDPACK_URL
    ssh_client_key: str  # SSH_CLIENT_KEY
    ssh_client_hosts: str  # SSH_CLIENT_HOSTS
    environment: Mapping[str, str]  # what buildpacks see

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Raises KeyError with the name of what is missing."""
        link = environ.get("APP_LINK", "/app")
        passed = {
            name: value for name, value in environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
        }
        return cls(
            work=Path(environ.get("TMPDIR") or "/tmp"),
            buildpacks=Path(environ.get("BUILDPACKS_DIR") or "/builder/buildpacks"),
            app_link=Path(link) if link else None,
            uid=int(environ.get("SLUG_UID") or SLUG_UID),
            slug_put_url=environ["SLUG_PUT_URL"],
            result_put_url=environ["RESULT_PUT_URL"],
            cache_get_url=environ.get("BUILD_CACHE_GET_URL", ""),
            cache_put_url=environ.get("BUILD_CACHE_PUT_URL", ""),
            ca_pem=environ.get("BLOBSTORE_CA", ""),
            buildpack_url=environ.get("BUILDPACK_URL", ""),
            ssh_client_key=environ.get("SSH_CLIENT_KEY", ""),
            ssh_client_hosts=environ.get("SSH_CLIENT_HOSTS", ""),
            environment=passed,
        )

    @property
    def source(self) -> Path:
        """The source as it was pushed; home of the buildpacks."""
        return self.work / "app"

    @property
    def root(self) -> Path:
        """The root of the slug's layer."""
        return self.work / "build"

    @property
    def build(self) -> Path:
        """The copy that buildpacks work on; `/app` of the slug."""
        return self.root / "app"

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    @property
    def env_dir(self) -> Path:
        return self.work / "env"

    @property
    def temporary(self) -> Path:
        """Where buildpacks may leave what they like: `work` itself need not be theirs."""
        return self.work / "tmp"

    def buildpack_environment(self) -> dict[str, str]:
        """Return the environment of `detect`, `compile` and `release`."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "xterm",
            "TMPDIR": str(self.temporary),
            "HOME": str(self.source),
            "APP_DIR": str(self.source),
            "USER": SLUG_USER,
            "REQUEST_ID": "flynn-build",
            "CURL_CONNECT_TIMEOUT": "30",
            "CURL_TIMEOUT": "600",
        }
        if CA_BUNDLE.exists():
            # Tools that bring their own list of authorities do not know those of the network they run in.
            for name in CA_BUNDLE_VARIABLES:
                environment[name] = str(CA_BUNDLE)
        return environment | dict(self.environment)
