"""Blob names: clean absolute paths, and how one becomes a place on a file system.

A name starts with `/`, has no empty, `.` or `..` component and no trailing slash. `/a` and `/a/b` may both exist as
blobs, so on disk a blob and a directory of the same name must not meet: every component is percent-encoded, which never
yields a comma, and blobs carry the suffix `,blob`.
"""

from __future__ import annotations

import posixpath
from urllib.parse import quote, unquote

from flynn.types.errors import ValidationError

BLOB_SUFFIX = ",blob"
MAX_COMPONENT_BYTES = 240  # file systems take 255, less the suffix and that of a file being written
MAX_NAME_BYTES = 2000


def clean(path: str) -> str:
    """Return `path` without doubled slashes, dot components and trailing slash; `/` stays `/`."""
    cleaned = posixpath.normpath("/" + path.lstrip("/"))
    return cleaned if cleaned.startswith("/") else "/"


def check(name: str) -> str:
    """Return a clean `name` that can be stored; raises ValidationError for one that cannot."""
    if "\0" in name:
        raise ValidationError("name", "must not contain a NUL character")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise ValidationError("name", f"must not be longer than {MAX_NAME_BYTES} bytes")
    for component in name.split("/"):
        if len(_encoded(component)) > MAX_COMPONENT_BYTES:
            raise ValidationError("name", f"has a component longer than {MAX_COMPONENT_BYTES} bytes")
    return name


def directory_path(name: str) -> str:
    """Return the relative file system path of the directory `name` (empty for the root)."""
    return "/".join(_encoded(component) for component in name.split("/") if component)


def blob_path(name: str) -> str:
    """Return the relative file system path of the record of blob `name`."""
    return directory_path(name) + BLOB_SUFFIX


def directory_name(path: str) -> str:
    """Return the name of the directory at a relative file system path: the reverse of `directory_path`."""
    return "/" if path == "." else "/" + "/".join(_decoded(component) for component in path.split("/"))


def child_name(directory: str, entry: str) -> str:
    """Return the name an entry of a directory stands for; directories end in a slash."""
    prefix = "" if directory == "/" else directory
    if entry.endswith(BLOB_SUFFIX):
        return f"{prefix}/{_decoded(entry.removesuffix(BLOB_SUFFIX))}"
    return f"{prefix}/{_decoded(entry)}/"


def _encoded(component: str) -> str:
    return quote(component, safe=" @+=:", errors="surrogateescape")


def _decoded(component: str) -> str:
    return unquote(component, errors="surrogateescape")
