"""Talking to the blobstore through signed URLs.

The job has no certificate of its own; it verifies the store's against the cluster's authority, which comes in the
environment.
"""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

ATTEMPTS = 3
PAUSE_SECONDS = 2.0
TIMEOUT_SECONDS = 60.0  # without a byte moving

T = TypeVar("T")
Warn = Callable[[int, Exception], None]


class TransferFailed(Exception):
    """The blobstore refused, or could not be reached in three attempts."""


class SignedTransfers:
    """GET and PUT of files, each tried three times."""

    def __init__(self, ca_pem: str) -> None:
        context = ssl.create_default_context(cadata=ca_pem or None)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # the store is in the cluster's network; a proxy is for the world outside
            urllib.request.HTTPSHandler(context=context),
        )

    def download(self, url: str, target: Path) -> bool:
        """Fetch `url` into a file; False when there is nothing under it.

        Raises:
            TransferFailed: after the last attempt.
        """

        def once() -> bool:
            try:
                with self._opener.open(url, timeout=TIMEOUT_SECONDS) as answer, target.open("wb") as file:
                    length = answer.headers.get("Content-Length")
                    copied = _copy(answer, file)
                    if length is not None and int(length) != copied:
                        raise http.client.IncompleteRead(b"", int(length) - copied)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return False
                raise
            return True

        return _tried(once, lambda attempt, error: None)

    def upload(self, source: Path, url: str, warn: Warn = lambda attempt, error: None) -> None:
        """PUT a file; `warn` hears of every failed attempt. Raises TransferFailed after the last."""

        def once() -> None:
            with source.open("rb") as file:
                request = urllib.request.Request(url, data=file, method="PUT")
                request.add_header("Content-Length", str(source.stat().st_size))
                request.add_header("Content-Type", "application/octet-stream")
                with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                    answer.read()

        _tried(once, warn)


def _tried(once: Callable[[], T], warn: Warn) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once()
        except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
            warn(attempt, error)
            last: Exception = error
        if attempt < ATTEMPTS:
            time.sleep(PAUSE_SECONDS)
    raise TransferFailed(str(last)) from last


def _copy(source: IO[bytes], target: IO[bytes]) -> int:
    copied = 0
    while piece := source.read(1 << 20):
        target.write(piece)
        copied += len(piece)
    return copied
