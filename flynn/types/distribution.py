"""What releases are called, and what their files are called in a repository of releases. Pure.

A repository is signed by The Update Framework; names are its target paths, relative to the repository. In addresses of
layers (`<repository>?target=/layers/<id>.squashfs`) they have a leading slash. See spec/bootstrap sections 9 and 10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from urllib.parse import parse_qs, urlsplit, urlunsplit

STABLE = "stable"

_VERSION = re.compile(r"v(\d{8})\.(.*)")
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, slots=True, order=True)
class ReleaseVersion:
    """`vYYYYMMDD.N`, ordered by day, then number."""

    day: str
    iteration: int

    def __str__(self) -> str:
        return f"v{self.day}.{self.iteration}"


def release_version(text: str) -> ReleaseVersion | None:
    """Read a version as the original does: what is no number counts as 0; `None` for anything else (dev)."""
    match = _VERSION.fullmatch(text)
    if match is None or not match[2]:
        return None
    return ReleaseVersion(match[1], int(match[2]) if match[2].isascii() and match[2].isdigit() else 0)


def next_version(released: Iterable[str], today: date) -> ReleaseVersion:
    """Return the version after all released ones of today."""
    day = f"{today:%Y%m%d}"
    taken = [version.iteration for text in released if (version := release_version(text)) and version.day == day]
    return ReleaseVersion(day, max(taken, default=-1) + 1)


def images_target(version: str) -> str:
    return f"{version}/images.json.gz"


def manifest_target(image_id: str) -> str:
    return f"images/{image_id}.json"


def layer_target(layer_id: str) -> str:
    return f"layers/{layer_id}.squashfs"


def channel_target(channel: str) -> str:
    return f"channels/{channel}"


def released_versions(targets: Iterable[str]) -> list[str]:
    """Return the versions whose images are among `targets`."""
    suffix = images_target("")
    return [target.removesuffix(suffix) for target in targets if target.endswith(suffix)]


def is_channel_name(text: str) -> bool:
    return _CHANNEL.fullmatch(text) is not None


# Artifacts in a repository do not know where the repository is: their addresses are references relative to it, which
# whoever downloads them resolves.
LAYER_REFERENCE = "?target=/layers/{id}.squashfs"


def image_reference(name: str, image_id: str) -> str:
    return f"?name={name}&target=/{manifest_target(image_id)}"


def resolved(reference: str, repository: str) -> str:
    """Make a reference absolute; an absolute address stays as it is."""
    return repository.rstrip("/") + reference if reference.startswith("?") else reference


def target_of(url: str) -> tuple[str, str] | None:
    """Split the address of a file in a repository into repository and target; `None` for any other address."""
    split = urlsplit(url)
    targets = parse_qs(split.query).get("target")
    if not targets:
        return None
    return urlunsplit((split.scheme, split.netloc, split.path, "", "")), targets[0].lstrip("/")
