"""The cluster's certificate authority: ECDSA P-256 keys, short-lived leaf certificates.

The authority's key lives on the hosts, which issue certificates to the system jobs that they start. User jobs get none.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flynn.identity.peer import Peer, PeerKind

CA_LIFETIME = timedelta(days=20 * 365)
HOST_LIFETIME = timedelta(days=365)
JOB_LIFETIME = timedelta(hours=24)
BACKDATED = timedelta(minutes=5)  # clocks of neighbours may be a little behind


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM texts: the authority's certificate, a leaf certificate, and the leaf's private key."""

    ca: bytes
    cert: bytes
    key: bytes

    def write(self, directory: Path, *, uid: int = -1, gid: int = -1) -> None:
        """Put the three files in `directory` (created 0700), each complete or absent; the key is the owner's alone."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content, mode in (
            ("ca.pem", self.ca, 0o644),
            ("key.pem", self.key, 0o600),
            ("cert.pem", self.cert, 0o644),
        ):
            write_private(directory / name, content, mode=mode, uid=uid, gid=gid)
        if uid >= 0 or gid >= 0:
            os.chown(directory, uid, gid)


def write_private(path: Path, content: bytes, *, mode: int = 0o600, uid: int = -1, gid: int = -1) -> None:
    """Write a file beside its place, sync it, and rename it there."""
    beside = path.with_name(f".{path.name}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        if uid >= 0 or gid >= 0:
            os.fchown(file.fileno(), uid, gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


class ClusterCA:
    """Issues the certificates of one cluster."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def create(cls, name: str = "Flynn cluster", now: datetime | None = None) -> ClusterCA:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start = (now or datetime.now(UTC)) - BACKDATED
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path) -> ClusterCA:
        """Read `ca.pem` and `ca.key`."""
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{directory / 'ca.key'} is not an elliptic curve key")
        return cls(certificate, key)

    @property
    def key_pem(self) -> bytes:
        return _key_pem(self._key)

    def save(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / "ca.key", _key_pem(self._key))
        write_private(directory / "ca.pem", self.pem, mode=0o644)

    def issue(
        self,
        peer: Peer,
        names: Iterable[str] = (),
        *,
        lifetime: timedelta = JOB_LIFETIME,
        now: datetime | None = None,
    ) -> Credentials:
        """A certificate for `peer`, valid as client and as server under `names` (host names and IP addresses)."""
        return self._leaf(
            str(peer),
            [x509.UniformResourceIdentifier(peer.uri), *(_general_name(name) for name in dict.fromkeys(names))],
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            lifetime,
            now or datetime.now(UTC),
            usage=_usage(digital_signature=True),
        )

    def issue_host(self, host_id: str, addresses: Iterable[str]) -> Credentials:
        names = ["flynn-host.discoverd", "leader.flynn-host.discoverd", "localhost", "127.0.0.1", *addresses]
        return self.issue(Peer(PeerKind.HOST, host_id), names, lifetime=HOST_LIFETIME)

    def issue_job(self, app: str, process: str, service: str, addresses: Iterable[str]) -> Credentials:
        """For a job of a system app; `service` is the discoverd service it answers for, or empty."""
        names = [f"{service}.discoverd", f"leader.{service}.discoverd"] if service else []
        names += ["localhost", "127.0.0.1", *addresses]
        return self.issue(Peer(PeerKind.APP, app, process), names)

    def issue_site(self, domains: Iterable[str], lifetime: timedelta = timedelta(days=5 * 365)) -> Credentials:
        """The default certificate of the router: what browsers, git and the `flynn` client see."""
        domains = list(domains)
        names = [x509.DNSName(name) for name in domains]
        return self._leaf(domains[0], names, [ExtendedKeyUsageOID.SERVER_AUTH], lifetime, datetime.now(UTC))

    def _leaf(
        self,
        common_name: str,
        names: Sequence[x509.GeneralName],
        purposes: Sequence[x509.ObjectIdentifier],
        lifetime: timedelta,
        now: datetime,
        *,
        usage: x509.KeyUsage | None = None,
    ) -> Credentials:
        """A fresh key, and a certificate for it that ends with the authority's own at the latest."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(min(now + lifetime, self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if usage is not None:
            builder = builder.add_extension(usage, critical=True)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Credentials(self.pem, certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def expiry_of(cert_pem: bytes) -> tuple[datetime, datetime]:
    """When the (first) certificate begins and ends to be valid."""
    certificate = x509.load_pem_x509_certificate(cert_pem)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
