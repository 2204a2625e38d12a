"""The private keys that releases are signed with: one directory for those of a vault, one for those of a server.

    <directory>/<role>.<start of the key id>.pem      PKCS 8, Ed25519, mode 0600; offline ones with a passphrase, if any

Root and targets say what is a release, so their keys stay off the machine that serves the repository. Snapshot and
timestamp are signed again and again without anybody at hand; who steals their keys can hold a host back or mix old
with new within the limits of expiry, but cannot make it run anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from flynn.identity.authority import write_private

OFFLINE_ROLES = ("root", "targets")
ONLINE_ROLES = ("snapshot", "timestamp")
ROLES = (*OFFLINE_ROLES, *ONLINE_ROLES)


class KeyProblem(Exception):
    """A key that is missing, cannot be read or is not kept well."""


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Where the private keys are. Whoever only signs timestamps has no offline directory.

    `passphrase` is that of the offline keys. Online keys have none: nobody is there to type it.
    """

    offline: Path
    online: Path
    passphrase: str = field(default="", repr=False)

    def directory(self, role: str) -> Path:
        return self.offline if role in OFFLINE_ROLES else self.online

    def signers(self, role: str) -> list[CryptoSigner]:
        """Return the signers of a role that are at hand; none is no error here."""
        return [_load(file, self._secret(role)) for file in sorted(self.directory(role).glob(f"{role}.*.pem"))]

    def create(self, role: str) -> CryptoSigner:
        """Make a new key for a role."""
        key = Ed25519PrivateKey.generate()
        signer = CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))
        secret = self._secret(role)
        protection = BestAvailableEncryption(secret) if secret else NoEncryption()
        content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
        directory = self.directory(role)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / f"{role}.{signer.public_key.keyid[:16]}.pem", content)
        return signer

    def retire(self, role: str, keyids: Iterable[str]) -> None:
        """Put keys that sign nothing any more aside."""
        retired = self.directory(role) / "retired"
        retired.mkdir(mode=0o700, exist_ok=True)
        for file in self.directory(role).glob(f"{role}.*.pem"):
            if _load(file, self._secret(role)).public_key.keyid in keyids:
                file.rename(retired / file.name)

    def _secret(self, role: str) -> bytes | None:
        return self.passphrase.encode() if self.passphrase and role in OFFLINE_ROLES else None


def kept_out_of(ring: KeyRing, places: Iterable[Path]) -> None:
    """Refuse keys in directories that get published: the sources and the repository. Raises `KeyProblem`."""
    if ring.offline.resolve() == ring.online.resolve():
        raise KeyProblem(f"offline and online keys must not share the directory {ring.offline}")
    for directory in (ring.offline, ring.online):
        for place in places:
            if directory.resolve().is_relative_to(place.resolve()):
                raise KeyProblem(f"private keys do not belong in {directory}: {place} is published")


def _load(file: Path, secret: bytes | None) -> CryptoSigner:
    try:
        if file.stat().st_mode & 0o077:
            raise KeyProblem(f"{file} can be read by others: chmod 600 it, and think about who has read it")
        key = load_pem_private_key(file.read_bytes(), password=secret)
    except (OSError, ValueError, TypeError) as error:
        raise KeyProblem(f"cannot read the key {file}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyProblem(f"{file} is no Ed25519 key")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))
