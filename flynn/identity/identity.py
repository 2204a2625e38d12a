"""A process's own identity: the three files that its host keeps fresh, and the TLS contexts made from them.

This module stays free of `cryptography`, which only the issuing side needs: importing it costs every daemon memory.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

DEFAULT_DIRECTORY = Path("/run/flynn/identity")


class Identity:
    """`ca.pem`, `cert.pem` and `key.pem` of one directory.

    The files change while the process runs (certificates live for a day), so contexts are remade when they did.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("ca.pem", "cert.pem", "key.pem"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: a part of the platform cannot run without its identity")
        self._client: tuple[tuple[int, int], ssl.SSLContext] | None = None

    @classmethod
    def load(cls, directory: Path | str) -> Identity:
        return cls(Path(directory))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Identity:
        """The directory that `FLYNN_IDENTITY` names; every job of a system app has one."""
        environment = os.environ if environment is None else environment
        return cls(Path(environment.get("FLYNN_IDENTITY") or DEFAULT_DIRECTORY))

    @property
    def ca_path(self) -> Path:
        return self.directory / "ca.pem"

    def stamp(self) -> tuple[int, int]:
        """Changes whenever the certificate was renewed."""
        status = (self.directory / "cert.pem").stat()
        return status.st_mtime_ns, status.st_ino

    def client_context(self) -> ssl.SSLContext:
        """Present our certificate, verify the server's chain and name. Cached until the files change."""
        stamp = self.stamp()
        if self._client is None or self._client[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(self.ca_path)
            self._load_chain(context)
            self._client = (stamp, context)
        return self._client[1]

    def server_context(self, *, require_client: bool = True) -> ssl.SSLContext:
        """Present our certificate and ask for the client's; without `require_client` a caller may have none.

        `refresh` loads a renewed certificate into it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # HAProxy and old libpq come with 1.2 as well
        context.load_verify_locations(self.ca_path)
        context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
        self._load_chain(context)
        return context

    def refresh(self, context: ssl.SSLContext) -> None:
        """Let `context` present the present certificate to new connections."""
        self._load_chain(context)

    def _load_chain(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.directory / "cert.pem", self.directory / "key.pem")
