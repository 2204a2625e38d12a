"""The client as its users run it: a process of its own, against the real API behind a door like the router's."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.controller.conftest import (
    KEY,
    Identities,
    World,
    conninfo,
    controller,
    identities,
    postgres_server,
    shop,
    stores,
    world,
)

__all__ = ["conninfo", "controller", "identities", "postgres_server", "shop", "stores", "world"]

FLYNN = Path(sys.executable).parent / "flynn"


@dataclass
class User:
    """Somebody with a home directory and a `flynn` program."""

    home: Path
    controller_url: str = ""
    pin: str = ""

    @property
    def env(self) -> dict[str, str]:
        return {
            "PATH": f"{FLYNN.parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FLYNNRC": str(self.home / "flynnrc"),
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    def knows(self, **fields: str) -> None:
        """Write the configuration with one cluster."""
        table = {
            "Name": "default",
            "Key": KEY,
            "TLSPin": self.pin,
            "ControllerURL": self.controller_url,
            "GitURL": "https://git.cluster.test",
            "ImageURL": "",
            **fields,
        }
        lines = "".join(f'  {name} = "{value}"\n' for name, value in table.items())
        (self.home / "flynnrc").write_text(f'default = "default"\n\n[[cluster]]\n{lines}')

    async def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `flynn`; standard error is appended to standard output, as in a terminal."""
        return await asyncio.to_thread(
            subprocess.run,
            [FLYNN, *arguments],
            env=self.env,
            cwd=self.home,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    async def __call__(self, *arguments: str, stdin: str = "") -> str:
        done = await self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, done.stdout
        return done.stdout

    async def fails(self, *arguments: str, code: int = 1, stdin: str = "") -> str:
        done = await self.run(*arguments, stdin=stdin)
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout


@asynccontextmanager
async def door(world: World, identities: Identities) -> AsyncIterator[tuple[str, str]]:
    """What the router is to a client: a TLS listener of its own before the API. Gives its URL and its pin."""
    outer = identities.app("router")
    upstream, context = world.address.rpartition(":"), outer.client_context()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(upstream[0], int(upstream[2]), ssl=context)
        async with asyncio.TaskGroup() as group:
            group.create_task(copy(reader, inner_writer))
            group.create_task(copy(inner_reader, writer))

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(outer.directory / "cert.pem", outer.directory / "key.pem")
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    leaf = ssl.PEM_cert_to_DER_cert((outer.directory / "cert.pem").read_text().split("-----END")[0] + PEM_END)
    pin = base64.b64encode(hashlib.sha256(leaf).digest()).decode()
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", pin


PEM_END = "-----END CERTIFICATE-----\n"


@pytest.fixture
async def flynn(world: World, identities: Identities, tmp_path: Path) -> AsyncIterator[User]:
    async with door(world, identities) as (url, pin):
        user = User(tmp_path, url, pin)
        user.knows()
        yield user
