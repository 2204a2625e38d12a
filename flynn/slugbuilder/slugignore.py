"""`.slugignore`: what of the source does not belong into the slug.

One glob per line, rooted at the top of the repository, `#` comments and blank lines; no negation. `**` crosses
directories. Nothing outside the tree is ever matched, not even through a symbolic link.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

FILE_NAME = ".slugignore"


def patterns(text: str) -> list[str]:
    """Return the globs of a `.slugignore`, relative to the top."""
    lines = (line.strip() for line in text.splitlines())
    relative = (line.strip("/") for line in lines if line and not line.startswith("#"))
    return [pattern for pattern in relative if pattern and ".." not in pattern.split("/")]


def matches(top: Path, globs: list[str]) -> list[Path]:
    """Return what the globs name in the tree, sorted, without what lies below another match."""
    found: set[Path] = set()
    real_top = top.resolve()
    for pattern in globs:
        for name in glob.glob(pattern, root_dir=top, recursive=True, include_hidden=True):
            path = top / name
            if path.parent.resolve() == (real_top / name).parent and path != top:  # not through a symbolic link
                found.add(path)
    return sorted(path for path in found if not any(parent in found for parent in path.parents))


def remove(path: Path) -> int:
    """Remove a file, or a directory with all in it; returns the number of files removed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return 1
    count = sum(len(files) for _, _, files in os.walk(path))
    shutil.rmtree(path)
    return count
