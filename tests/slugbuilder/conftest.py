"""A real blobstore for real builds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.blobstore.api import blobstore_api
from flynn.blobstore.client import Blobstore, sign
from flynn.blobstore.volume import VolumeBackend
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA

KEY = "key"


@dataclass
class Store:
    url: str
    ca_pem: str
    blobs: Blobstore

    def signed(self, method: str, name: str) -> str:
        return sign(KEY, method, name, within=timedelta(hours=1), now=datetime.now(UTC), url=self.url)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    ca = ClusterCA.create()
    ca.issue_job("blobstore", "web", "blobstore", []).write(tmp_path / "blobstore")
    ca.issue_job("gitreceive", "app", "gitreceive", []).write(tmp_path / "gitreceive")
    api = blobstore_api(VolumeBackend(tmp_path / "blobs"), signing_key=KEY, clock=SystemClock())
    own = Identity.load(tmp_path / "blobstore")
    async with listen(api, "127.0.0.1", 0, tls=own, require_client=False) as (_, port):
        url = f"https://127.0.0.1:{port}"
        async with HttpClient(url, tls=Identity.load(tmp_path / "gitreceive")) as http:
            yield Store(url, ca.pem.decode(), Blobstore(http))
