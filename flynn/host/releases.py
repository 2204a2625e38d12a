"""Signed releases as the daemon uses them: downloads in threads that can be broken off.

The download package and its libraries are imported at the first use; most daemons never have one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from flynn.host.download.errors import DownloadFailed
from flynn.types.errors import ApiError, PreconditionFailed
from flynn.types.host import ImagePullInfo

if TYPE_CHECKING:
    from flynn.host.download.trust import TrustedRepository


class Releases:
    """What this host may take from repositories it trusts."""

    def __init__(self, state_dir: Path, config_dir: Path, program_dir: Path) -> None:
        self._state_dir, self._config_dir, self._program_dir = state_dir, config_dir, program_dir

    async def fetch(self, repository: str, name: str, into: Path) -> None:
        """Have the verified content of a file in `into`, below the state directory. Raises `DownloadFailed`."""
        source = self._trusted(repository)
        try:
            await asyncio.to_thread(source.fetch, name, into)
        except asyncio.CancelledError:
            source.cut()
            raise

    async def pull(self, repository: str, version: str) -> AsyncIterator[ImagePullInfo]:
        """Have a release on this host, telling each layer and image when it is here. Raises `ApiError`."""
        from flynn.host.download.pull import Places, Pulled, pull, wanted_version

        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Pulled | None] = asyncio.Queue()  # no more than the release has images and layers

        def tell(pulled: Pulled | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, pulled)

        def work() -> None:
            try:
                wanted = wanted_version(source, version=version, channel="")
                pull(source, wanted, Places(self._state_dir / "layers", self._config_dir), tell)
            finally:
                tell(None)

        try:
            source = self._trusted(repository)
            working = asyncio.ensure_future(asyncio.to_thread(work))
            try:
                while (pulled := await told.get()) is not None:
                    yield pulled
                await working
            finally:
                source.cut()
                working.cancel()
        except DownloadFailed as error:
            raise ApiError(str(error)) from error

    async def pull_program(self, repository: str, version: str) -> dict[str, str]:
        """Have the program of a release on this host, beside the one that runs; returns the paths of its commands.

        Raises `PreconditionFailed`: there is no such release, or it is not trusted.
        """
        from flynn.host.download.program import install
        from flynn.host.download.pull import wanted_version

        def work() -> dict[str, str]:
            return install(source, wanted_version(source, version=version, channel=""), self._program_dir)

        try:
            source = self._trusted(repository)
            try:
                return await asyncio.to_thread(work)
            finally:
                source.cut()
        except DownloadFailed as error:
            raise PreconditionFailed(str(error)) from error

    def _trusted(self, repository: str) -> TrustedRepository:
        from flynn.host.download.trust import ROOT_FILE, TrustedRepository

        return TrustedRepository(repository, self._state_dir / "tuf", roots=(self._config_dir / ROOT_FILE,))
