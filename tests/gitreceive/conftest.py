"""A whole platform around a real gitreceive."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from flynn.aio.clock import SystemClock
from flynn.blobstore.api import blobstore_api
from flynn.blobstore.client import Blobstore
from flynn.blobstore.volume import VolumeBackend
from flynn.gitreceive.main import Config, running
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.instance import Instance
from tests.gitreceive.platform import REPOSITORY, Controller, Host, Platform, directory_api

KEY = "controller-key"
SIGNING_KEY = "signing-key"


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest-") or parent == tmp_path:
            parent.chmod(0o755)  # builds run as another user
    ca = ClusterCA.create()
    for name in ("controller", "blobstore", "gitreceive", "router", "discoverd"):
        ca.issue_job(name, "web", name, []).write(tmp_path / name)
    ca.issue_host("host1", []).write(tmp_path / "host")
    identity = {name: Identity.load(tmp_path / name) for name in ("controller", "blobstore", "discoverd", "host")}
    (tmp_path / "jobs").mkdir(mode=0o755)
    (tmp_path / "tmp").mkdir()
    receiver = tmp_path / "receiver"
    receiver.write_text(
        f'#!/bin/bash\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m flynn.gitreceive.receiver "$@"\n'
    )
    receiver.chmod(0o755)

    controller, host = Controller(), Host(tmp_path / "jobs")
    async with AsyncExitStack() as stack:

        async def serve(api: object, name: str, *, require_client: bool = True) -> int:
            address = await stack.enter_async_context(
                listen(api, "127.0.0.1", 0, tls=identity[name], require_client=require_client)  # type: ignore[arg-type]  # any Api
            )
            return address[1]

        store = blobstore_api(VolumeBackend(tmp_path / "blobs"), signing_key=SIGNING_KEY, clock=SystemClock())
        blobs_port = await serve(store, "blobstore", require_client=False)
        host_port = await serve(host.api(), "host")
        instances = {"flynn-host": [Instance.at(f"127.0.0.1:{host_port}", "https", {"id": "host1"})]}
        refused: set[str] = set()
        discoverd_port = await serve(directory_api(instances, refused), "discoverd")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "home"),
            "PORT": "0",
            "FLYNN_JOB_ID": "host1-gitreceive",
            "LISTEN_IP": "127.0.0.1",
            "EXTERNAL_IP": "127.0.0.1",
            "DISCOVERD": f"127.0.0.1:{discoverd_port}",
            "FLYNN_IDENTITY": str(tmp_path / "gitreceive"),
            "FLYNN_RECEIVER": str(receiver),
            "TMPDIR": str(tmp_path / "tmp"),
            "CONTROLLER_KEY": KEY,
            "CONTROLLER_URL": f"https://127.0.0.1:{await serve(controller.api(), 'controller')}",
            "BLOBSTORE_URL": f"https://127.0.0.1:{blobs_port}",
            "BLOBSTORE_SIGNING_KEY": SIGNING_KEY,
            "SLUGBUILDER_18_IMAGE_ID": "builder",
            "SLUGRUNNER_18_IMAGE_ID": "runner",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "protocol.file.allow",
            "GIT_CONFIG_VALUE_0": "always",
        }
        config = Config.from_environment(environment)
        await stack.enter_async_context(running(config))
        http = await stack.enter_async_context(
            HttpClient(config.blobstore_url, tls=Identity.load(tmp_path / "gitreceive"))
        )
        (port,) = {instance.port for instance in instances["gitreceive"]}
        yield Platform(
            controller=controller,
            host=host,
            blobs=Blobstore(http),
            url=f"https://127.0.0.1:{port}",
            ca=tmp_path / "router" / "ca.pem",
            key=KEY,
            directory=tmp_path,
            environment=environment,
            instances=instances,
            refused=refused,
        )
        await host.end()
