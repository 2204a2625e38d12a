"""Bring a release onto this host: layers into the layer store, then the list of its images into the config directory.

The list comes last and by renaming, so `images.<version>.json` stands for a release that is here completely.
"""

from __future__ import annotations

import gzip
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from flynn.host.download.errors import DownloadFailed, NotReleased, Reason, Refused
from flynn.host.download.trust import MAX_SMALL_BYTES, TrustedRepository
from flynn.host.layers import settle
from flynn.host.runtime.layers import LayerError, verify
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, Layer
from flynn.types.codec import builtins, decode, encode_indented, replace
from flynn.types.distribution import (
    STABLE,
    channel_target,
    images_target,
    is_channel_name,
    layer_target,
    release_version,
    resolved,
)
from flynn.types.errors import ApiError
from flynn.types.host import ImagePullInfo

log = logging.getLogger(__name__)

AT_A_TIME = 3  # downloads: one connection seldom fills a line, many would be unkind to the server

PRESENT, FETCHED = "present", "fetched"


class Pulled(ImagePullInfo):
    """What has become of an image or a layer."""

    state: str = ""  # of a layer: present or fetched


@dataclass(frozen=True, slots=True)
class Places:
    """Where a release goes."""

    layers: Path  # <state dir>/layers
    config: Path


def wanted_version(repository: TrustedRepository, *, version: str, channel: str) -> str:
    """Return the version asked for, else the one the channel points at. Raises `DownloadFailed`."""
    if version:
        return checked_version(version)
    if not is_channel_name(channel or STABLE):
        raise DownloadFailed(f"{channel!r} cannot name a channel")
    return checked_version(repository.read(channel_target(channel or STABLE)).decode("ascii", "replace").strip())


def pull(repository: TrustedRepository, version: str, places: Places, tell: Callable[[Pulled], None]) -> Path:
    """Have a release on this host and return its list of images. Blocking; what is here already is not fetched again.

    A layer on the disk that is not what the release says is replaced. `tell` is called from this thread and others.

    Raises:
        DownloadFailed
    """
    images = read_images(repository, version)
    places.layers.mkdir(mode=0o700, parents=True, exist_ok=True)
    by_layer: dict[str, tuple[str, Layer]] = {}
    for name, artifact in images.items():
        for layer in _layers(name, artifact):
            _, known = by_layer.setdefault(layer.id, (name, layer))
            if known != layer:
                raise Refused(Reason.MALFORMED, version, f"layer {layer.id} has two contents")
    with ThreadPoolExecutor(AT_A_TIME, "download") as pool:
        try:
            jobs = [
                pool.submit(_have_layer, repository, name, layer, places.layers, tell)
                for name, layer in by_layer.values()
            ]
            wait(jobs, return_when=FIRST_EXCEPTION)
            for job in jobs:
                if job.done():
                    job.result()
        except BaseException:
            repository.cut()  # the others would go on for a long time
            pool.shutdown(cancel_futures=True)
            raise
    for name, artifact in images.items():
        tell(Pulled(name=name, type="image", artifact=builtins(artifact)))
    target = places.config / f"images.{version}.json"
    try:
        places.config.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(target, encode_indented(images))
    except OSError as error:
        raise DownloadFailed(f"{target}: {error.strerror or error}") from error
    repository.sweep()
    return target


def read_images(repository: TrustedRepository, version: str) -> dict[str, Artifact]:
    """Return the artifacts of a release, their addresses made absolute."""
    name = images_target(checked_version(version))
    try:
        images = decode(unpacked(repository.read(name)), dict[str, Artifact])
    except (ApiError, zlib.error, OSError, EOFError) as error:
        raise Refused(Reason.MALFORMED, name, str(error)) from error
    return {
        image: replace(
            artifact,
            uri=resolved(artifact.uri, repository.address),
            layer_url_template=resolved(artifact.layer_url_template, repository.address),
        )
        for image, artifact in images.items()
    }


def checked_version(version: str) -> str:
    """Return what is a version: it becomes a file name. Raises `NotReleased`."""
    if release_version(version) is None or "/" in version:
        raise NotReleased(f"{version!r} is no version: expected vYYYYMMDD.N")
    return version


def _layers(name: str, artifact: Artifact) -> Iterable[Layer]:
    for layer in artifact.image().layers():
        if layer.type != SQUASHFS_TYPE or not layer.id or "/" in layer.id or layer.id.startswith("."):
            raise Refused(Reason.MALFORMED, name, f"{layer.id!r} is no layer")
        yield layer


def _have_layer(
    repository: TrustedRepository, name: str, layer: Layer, directory: Path, tell: Callable[[Pulled], None]
) -> None:
    target = directory / f"{layer.id}.squashfs"
    state = FETCHED
    try:
        if target.exists():
            try:
                verify(target, layer.hashes, layer.length)
                state = PRESENT
            except LayerError as error:
                log.warning("layer replaced, it was not what it should be", extra={"reason": str(error)})
        if state == FETCHED:
            part = directory / f".{layer.id}.{_own_name()}.part"
            try:
                repository.fetch(layer_target(layer.id), part)
                # The signed list vouches for the file, the signed image for this being the layer it means.
                verify(part, layer.hashes, layer.length)
                settle(part, target)
            finally:
                part.unlink(missing_ok=True)
    except LayerError as error:
        raise Refused(Reason.MISMATCH, f"layer {layer.id}", str(error)) from error
    except OSError as error:
        raise DownloadFailed(f"layer {layer.id}: {error.strerror or error}") from error
    tell(Pulled(name=name, type="layer", layer=builtins(layer), state=state))


def unpacked(content: bytes) -> bytes:
    """Unpack gzip, up to a limit: a few bytes can stand for very many."""
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    unpacked = unpacker.decompress(content, MAX_SMALL_BYTES)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise gzip.BadGzipFile("it does not end where it should")
    return unpacked


def _own_name() -> str:
    """What no other download calls its files."""
    return f"{os.getpid()}-{threading.get_ident()}"


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{_own_name()}")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
