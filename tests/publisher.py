"""A maintainer with a build, keys and a repository: what the tests of releases and downloads begin with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from flynn.host.download.program import own_kind
from flynn.images.keys import KeyRing
from flynn.images.release import Published, release
from flynn.images.repository import Lifetimes, RootPolicy, SignedRepository
from flynn.images.store import Store, write_synced
from flynn.types.artifact import Artifact, ImageManifest, Layer, Platform, Rootfs
from flynn.types.codec import decode, encode, sha512_256


class Publisher:
    """`images` are those of the build; `now` is the maintainer's clock."""

    def __init__(self, home: Path, *, lifetimes: Lifetimes | None = None, policy: RootPolicy | None = None) -> None:
        self.home, self.policy = home, policy or RootPolicy()
        self.store = Store(home / "cache")
        self.images = home / "images"
        self.ring = KeyRing(home / "keys/offline", home / "keys/online")
        self.now = datetime.now(UTC)
        self.out = home / "repository"
        self._lifetimes = lifetimes
        self.protect("")
        self.said: list[str] = []
        self.python = own_kind()

    def protect(self, passphrase: str) -> None:
        """Use this passphrase for the offline keys from now on."""
        self.ring = KeyRing(self.ring.offline, self.ring.online, passphrase)
        self.repository = SignedRepository(self.out, self.ring, lifetimes=self._lifetimes, now=lambda: self.now)

    def layer(self, layer_id: str, content: bytes) -> Layer:
        """Build a layer."""
        path = self.store.squashfs(layer_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, content)
        return Layer(
            id=layer_id,
            type="application/vnd.flynn.image.squashfs.v1",
            length=len(content),
            hashes={"sha512_256": sha512_256(content)},
        )

    def image(self, name: str, layers: Iterable[Layer]) -> Artifact:
        """Build an image."""
        rootfs = Rootfs(platform=Platform(architecture="amd64", os="linux"), layers=list(layers))
        manifest = ImageManifest(rootfs=[rootfs])
        artifact = Artifact(
            type="flynn",
            uri=f"file:///nowhere/{manifest.id()}.json",
            meta={"flynn.component": name, "flynn.system-image": "true"},
            manifest=manifest.document(),
            hashes={"sha512_256": manifest.id()},
            size=len(manifest.canonical()),
            layer_url_template="file:///nowhere/{id}.squashfs",
        )
        self.images.mkdir(parents=True, exist_ok=True)
        (self.images / f"{name}.json").write_bytes(encode(artifact))
        return artifact

    def build(self, code: bytes = b"code") -> None:
        """Build two images that share a layer."""
        base = self.layer("base", b"debian" * 1000)
        self.image("router", [base, self.layer(f"code-{code.decode()}", code)])
        self.image("controller", [base])

    def release(self, version: str = "", channel: str = "stable", wheels: Path | None = None) -> Published:
        return release(
            self.repository,
            images=self.images,
            cache=self.store.root,
            channel=channel,
            version=version,
            today=self.now.date(),
            policy=self.policy,
            say=self.said.append,
            wheels=wheels,
            python=self.python,
        )

    def renew(self, within: timedelta = timedelta(0)) -> list[str]:
        with self.repository.locked():
            return self.repository.renew(within=within)

    def rotate(self, role: str) -> None:
        with self.repository.locked():
            self.repository.rotate(role)

    @property
    def root(self) -> Path:
        return self.out / "metadata/1.root.json"

    def copy(self, name: str) -> Path:
        """Return a copy of the repository as it is now: an attacker's, or a mirror's."""
        shutil.copytree(self.out, self.home / name, copy_function=shutil.copyfile)
        return self.home / name

    def files(self) -> set[str]:
        return {str(file.relative_to(self.out)) for file in self.out.rglob("*") if file.is_file()}


def edited(file: Path, **changes: Any) -> None:
    """Change what a metadata file says and leave its signatures alone."""
    document = json.loads(file.read_bytes())
    document["signed"].update(changes)
    file.write_text(json.dumps(document))


def newest(repository: Path, role: str) -> Path:
    files = repository.glob(f"metadata/*.{role}.json")
    return max(files, key=lambda file: int(file.name.partition(".")[0]))


def target_file(repository: Path, pattern: str) -> Path:
    (found,) = repository.glob(f"targets/{pattern}")
    return found


def signed_by(publisher: Publisher, role: str, file: Path, **changes: Any) -> None:
    """Change a metadata file and sign it with the role's keys: what a thief of those keys can do."""
    edited(file, **changes)
    metadata: Metadata[Any] = Metadata.from_bytes(file.read_bytes())
    metadata.signatures.clear()
    for signer in publisher.ring.signers(role):
        metadata.sign(signer, append=True)
    file.write_bytes(metadata.to_bytes())


def images_of(file: Path) -> dict[str, Artifact]:
    return decode(file.read_bytes(), dict[str, Artifact])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
