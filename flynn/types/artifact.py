"""Artifacts and image manifests. See spec/bootstrap section 8."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Wire, canonical, sha512_256

MANIFEST_TYPE = "application/vnd.flynn.image.manifest.v1+json"
SQUASHFS_TYPE = "application/vnd.flynn.image.squashfs.v1"
DEFAULT_ENTRYPOINT = "_default"


class Layer(Wire):
    id: str = ""
    type: str = ""
    length: int = 0  # bytes
    hashes: dict[str, str] = {}  # algorithm -> hex
    meta: dict[str, str] = {}


class Platform(Wire):
    architecture: str = ""
    os: str = ""


class Rootfs(Wire):
    platform: Platform | None = None
    layers: list[Layer] = []


class Entrypoint(Wire):
    env: dict[str, str] = {}
    cwd: str = ""
    args: list[str] = []
    linux_capabilities: list[str] | None = None  # None = the host's defaults, [] = none at all
    uid: int | None = None
    gid: int | None = None


class ImageManifest(Wire):
    """What an image consists of. Its id is the hash of its canonical JSON, so equal content has one id."""

    type: str = MANIFEST_TYPE
    meta: dict[str, str] = {}
    entrypoints: dict[str, Entrypoint] = {}
    rootfs: list[Rootfs] = []

    def document(self) -> dict[str, object]:
        """The manifest as written: `_type` is always there."""
        from flynn.types.codec import builtins

        plain: dict[str, object] = builtins(self)
        plain.pop("type", None)
        return {"_type": self.type, **plain}

    def canonical(self) -> bytes:
        return canonical(self.document())

    def id(self) -> str:
        return sha512_256(self.canonical())

    def layers(self) -> list[Layer]:
        """The layers from the bottom up. Manifests with several root file systems are not used by anybody."""
        return self.rootfs[0].layers if len(self.rootfs) == 1 else []


class Artifact(Wire):
    id: str = ""
    type: str = ""
    uri: str = ""
    meta: dict[str, str] = {}
    manifest: dict[str, object] | None = None
    hashes: dict[str, str] = {}
    size: int = 0  # bytes of the canonical manifest
    layer_url_template: str = ""
    created_at: datetime | None = None

    def image(self) -> ImageManifest:
        from flynn.types.codec import convert

        document = dict(self.manifest or {})
        document["type"] = document.pop("_type", MANIFEST_TYPE)
        return convert(document, ImageManifest)

    def layer_url(self, layer: Layer) -> str:
        return self.layer_url_template.replace("{id}", layer.id)
