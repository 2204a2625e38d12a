"""Publish built images as a release: artifacts, manifests and layers become targets of a signed repository.

What has been published already is not published again, so a release whose layers did not change adds three small files.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tuf.api.metadata import TargetFile

from flynn.images.repository import HASH, RootPolicy, SignedRepository
from flynn.images.store import Store
from flynn.types.artifact import Artifact, Layer
from flynn.types.codec import decode, encode, replace, sha512_256
from flynn.types.distribution import (
    LAYER_REFERENCE,
    channel_target,
    image_reference,
    images_target,
    is_channel_name,
    layer_target,
    manifest_target,
    next_version,
    release_version,
    released_versions,
)
from flynn.types.errors import ApiError
from flynn.types.program import Program, Wheel, program_target, wheel_target

CHUNK_BYTES = 1 << 20


class ReleaseProblem(Exception):
    """The images cannot be released as they are."""


@dataclass(frozen=True, slots=True)
class Image:
    """An artifact whose manifest has been checked against its id."""

    artifact: Artifact
    id: str
    manifest: bytes
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Published:
    version: str
    files: int  # that were not there before
    bytes: int


def release(
    repository: SignedRepository,
    *,
    images: Path,
    cache: Path,
    channel: str,
    version: str,
    today: date,
    policy: RootPolicy,
    say: Callable[[str], None],
    wheels: Path | None = None,
    python: str = "",
) -> Published:
    """Publish the artifacts in the directory `images`, whose layers are in `cache`, and point `channel` at them.

    With `wheels`, a directory of flynn-host and all it needs for the kind of Python `python`, hosts can be updated.

    An empty `version` takes the next one of today. The repository is begun, with new keys, if there is none.

    Raises:
        ReleaseProblem: an image is not what its artifact says, or contradicts what has been released.
        KeyProblem, RepositoryProblem
    """
    if not is_channel_name(channel):
        raise ReleaseProblem(f"{channel!r} cannot name a channel")
    known = read_images(images)
    with repository.locked():
        if not repository.exists:
            repository.create(policy)
            say(f"new repository; hosts trust it by {repository.directory}/metadata/1.root.json")
        released = repository.targets().targets
        version = version or str(next_version(released_versions(released), today))
        if release_version(version) is None:
            raise ReleaseProblem(f"a version is vYYYYMMDD.N, not {version!r}")
        if images_target(version) in released:
            raise ReleaseProblem(f"{version} has been released already")
        targets, files = _targets(known, Store(cache), released, version, channel)
        if wheels is not None:
            _add_program(targets, files, wheels, python, version)
        added = [name for name, target in targets.items() if repository.place(target, files[name])]
        repository.publish(targets)
    return Published(version, len(added), sum(targets[name].length for name in added))


def read_images(directory: Path) -> dict[str, Image]:
    """Read and check the artifacts of a build."""
    images: dict[str, Image] = {}
    for file in sorted(directory.glob("*.json")):
        try:
            artifact = decode(file.read_bytes(), Artifact)
            image = artifact.image()
            content = image.canonical()
        except (ApiError, ValueError) as error:
            raise ReleaseProblem(f"{file}: {error}") from error
        if artifact.hashes.get("sha512_256") != sha512_256(content) or artifact.size != len(content):
            raise ReleaseProblem(f"{file}: the manifest is not the one its hash names")
        images[file.stem] = Image(artifact, sha512_256(content), content, tuple(image.layers()))
    if not images:
        raise ReleaseProblem(f"there are no images in {directory}")
    return images


def images_json(images: Mapping[str, Image]) -> bytes:
    """Write the map from names to artifacts that bootstrap reads, with addresses relative to the repository."""
    return encode(
        {
            name: replace(image.artifact, uri=image_reference(name, image.id), layer_url_template=LAYER_REFERENCE)
            for name, image in sorted(images.items())
        }
    )


def _targets(
    images: Mapping[str, Image], store: Store, released: Mapping[str, TargetFile], version: str, channel: str
) -> tuple[dict[str, TargetFile], dict[str, Path | bytes]]:
    """What the release consists of and where it is now."""
    small = {
        images_target(version): gzip.compress(images_json(images), mtime=0),
        channel_target(channel): version.encode(),
        **{manifest_target(image.id): image.manifest for image in images.values()},
    }
    targets = {name: TargetFile.from_data(name, content, [HASH]) for name, content in small.items()}
    files: dict[str, Path | bytes] = {**small}
    for layer in {layer.id: layer for image in images.values() for layer in image.layers}.values():
        name = layer_target(layer.id)
        files[name] = store.squashfs(layer.id)
        targets[name] = _layer_file(layer, store.squashfs(layer.id))
        if name in released and released[name].hashes != targets[name].hashes:
            raise ReleaseProblem(
                f"layer {layer.id} has been released with other content: hosts that have it would refuse this one. "
                f"Put the released file back into {store.root} and build again, or change the layer's recipe"
            )
    return targets, files


def _add_program(
    targets: dict[str, TargetFile], files: dict[str, Path | bytes], wheels: Path, python: str, version: str
) -> None:
    listed = []
    for wheel in sorted(wheels.glob("*.whl")):
        content = wheel.read_bytes()
        name = wheel_target(hashlib.sha256(content).hexdigest()[:16], wheel.name)
        targets[name], files[name] = TargetFile.from_data(name, content, [HASH]), wheel
        listed.append(Wheel(name=wheel.name, target=name))
    if not any(wheel.name.startswith("flynn-") for wheel in listed):
        raise ReleaseProblem(f"flynn itself is not in {wheels}")
    name, content = program_target(version), gzip.compress(encode(Program(python=python, wheels=listed)), mtime=0)
    targets[name], files[name] = TargetFile.from_data(name, content, [HASH]), content


def _layer_file(layer: Layer, file: Path) -> TargetFile:
    """Hash a layer's file once, for the signature and against its manifest: nothing else is signed."""
    ours, theirs, length = hashlib.new(HASH), hashlib.new("sha512_256"), 0
    try:
        with file.open("rb") as reading:
            while chunk := reading.read(CHUNK_BYTES):
                ours.update(chunk)
                theirs.update(chunk)
                length += len(chunk)
    except FileNotFoundError:
        raise ReleaseProblem(f"layer {layer.id} is not in the cache; build the images again") from None
    if length != layer.length or theirs.hexdigest() != layer.hashes.get("sha512_256"):
        raise ReleaseProblem(f"{file} is not the layer that was built: its content has changed")
    return TargetFile(length, {HASH: ours.hexdigest()}, layer_target(layer.id))
