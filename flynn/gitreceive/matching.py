"""Which of git's services a request is for, and of which app. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

APP_NAME = re.compile(r"[a-z\d]+(-[a-z\d]+)*")
MAX_NAME = 100


class Service(StrEnum):
    UPLOAD_PACK = "git-upload-pack"  # clone and fetch
    RECEIVE_PACK = "git-receive-pack"  # push


@dataclass(frozen=True, slots=True)
class Advertise:
    """GET /<app>.git/info/refs"""

    app: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """POST /<app>.git/git-<service>"""

    app: str
    service: Service


def match(method: str, path: str) -> Advertise | Exchange | None:
    """Return what is asked for; None for everything that is none of the three requests. `app` is a name or an id."""
    if method == "GET" and path.endswith("/info/refs"):
        app = _app(path.removesuffix("/info/refs"))
        return Advertise(app) if app else None
    if method == "POST":
        for service in Service:
            if path.endswith(f"/{service}"):
                app = _app(path.removesuffix(f"/{service}"))
                return Exchange(app, service) if app else None
    return None


def _app(path: str) -> str | None:
    name = path.removeprefix("/").removesuffix(".git")
    return name if len(name) <= MAX_NAME and APP_NAME.fullmatch(name) else None
