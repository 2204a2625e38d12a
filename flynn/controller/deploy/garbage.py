"""Which old releases an app can do without. Pure; spec/controller-worker section 6.

Only releases of pushed code count. The newest ones that cover `keep` distinct slugs stay, so that an app can be rolled
back that far; what is running or current is never touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flynn.types.artifact import Artifact
from flynn.types.errors import ValidationError
from flynn.types.release import Release

KEEP_META = "gc.max_inactive_slug_releases"
OFF = "false"


def slugs_to_keep(meta: Mapping[str, str]) -> int | None:
    """Return how many inactive slugs an app wants kept; None = collect nothing. Raises `ValidationError`."""
    text = meta.get(KEEP_META, OFF)
    if text == OFF:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValidationError(KEEP_META, f'must be a number or "false", not {text!r}')
    return int(text)


def releases_to_delete(
    releases: Sequence[Release], artifacts: Mapping[str, Artifact], needed: Collection[str], keep: int
) -> list[str]:
    """Return the ids of the releases to delete.

    `releases` are the app's, newest first; `needed` are those with running processes and the current one.
    """
    seen: set[str] = set()
    doomed = []
    for release in releases:
        if release.id in needed or release.meta.get("git") != "true":
            continue
        if len(seen) >= keep:
            doomed.append(release.id)
        slug = artifacts.get(release.artifacts[1]) if len(release.artifacts) > 1 else None
        if slug is not None and slug.meta.get("blobstore") == "true":
            seen.add(slug.uri)
    return doomed
