"""The files that go into a layer: listed with size and hash, and copied."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flynn.images.plan import InputFile

IGNORED = "__pycache__"


def input_files(path: Path, name: str) -> Iterator[InputFile]:
    """The files at or below `path` in a fixed order, called `name` or `name/...`."""
    if path.is_file():
        yield _input_file(path, name)
    for directory, names, found in os.walk(path):
        names[:] = sorted(set(names) - {IGNORED})
        for file in sorted(found):
            inside = Path(directory, file)
            yield _input_file(inside, f"{name}/{inside.relative_to(path)}")


def _input_file(path: Path, name: str) -> InputFile:
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    return InputFile(name, len(content), hashlib.new("sha512_256", content).hexdigest(), os.access(path, os.X_OK))


def copy_files(source: Path, target: Path) -> None:
    """Copy a file or tree with modes and links, but without owners: all of an image belongs to root."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(IGNORED))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
