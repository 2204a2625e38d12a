"""The git repositories of apps: kept as a tar in the blobstore, unpacked for every request.

`/repos/<app id>.tar` holds `.git` and what is below it, as the original writes it. A repository that changed is saved
on condition that nobody else has saved one meanwhile, before git reports success.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.blobstore.client import Blobstore
from flynn.gitreceive.hook import PRE_RECEIVE
from flynn.types.errors import NotFound

log = logging.getLogger(__name__)

READ_BYTES = 256 << 10
COMMAND_SECONDS = 60.0

CONFIG = (
    ("gc.autoDetach", "false"),  # a detached gc would race with the upload
    ("receive.denyCurrentBranch", "ignore"),  # the work tree is made anew for every build
    ("receive.keepAlive", "5"),  # a quiet build must not look like a dead connection
    ("transfer.fsckObjects", "false"),
)


class Broken(Exception):
    """The repository could not be prepared or saved; the text is for the log."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository unpacked on disk."""

    app_id: str
    path: Path  # of the work tree; git's data is in `.git`
    etag: str  # of the tar it came from, empty for a new one


class Repositories:
    """Fetches and saves repositories."""

    def __init__(self, blobs: Blobstore, directory: Path) -> None:
        self._blobs = blobs
        self._directory = directory

    @asynccontextmanager
    async def unpacked(self, app_id: str) -> AsyncIterator[Repository]:
        """The app's repository while the block runs, a new one if it has none.

        Raises:
            Broken: the tar cannot be unpacked. What the blobstore answers otherwise is raised as it is.
        """
        path = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="repo-", dir=self._directory))
        try:
            try:
                async with self._blobs.open(_blob(app_id)) as (info, chunks):
                    await _unpack(chunks, path)
                    etag = info.etag
            except NotFound:
                await command("git", "init", "--quiet", "--initial-branch=master", str(path))
                etag = ""
            await asyncio.to_thread(_prepare, path)
            for name, value in CONFIG:
                await command("git", "config", "--file", str(path / ".git" / "config"), name, value)
            yield Repository(app_id, path, etag)
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def save(self, repository: Repository) -> None:
        """Store the repository; returns once it is durable.

        Raises:
            PreconditionFailed: another push has stored one since this one was fetched.
            Broken: it cannot be packed.
        """
        await self._blobs.put(
            _blob(repository.app_id),
            _packed(repository.path),
            content_type="application/x-tar",
            if_match=repository.etag or None,
            only_create=not repository.etag,
        )


def _blob(app_id: str) -> str:
    return f"/repos/{app_id}.tar"


def _prepare(path: Path) -> None:
    git = path / ".git"
    if not (git / "HEAD").is_file():
        raise Broken(f"{path}: no git repository in the tar")
    (git / "HEAD").write_text("ref: refs/heads/master\n")  # the original leaves a commit id here, perhaps a lost one
    for name in ("refs", "objects", "hooks"):
        (git / name).mkdir(exist_ok=True)
    hook = git / "hooks" / "pre-receive"
    hook.unlink(missing_ok=True)
    hook.write_text(PRE_RECEIVE)
    hook.chmod(0o755)


async def refs_of(repository: Repository) -> bytes:
    """Return all refs with their commits, to tell whether a push changed anything."""
    return await command("git", "-C", str(repository.path), "for-each-ref")


async def command(*argv: str) -> bytes:
    """Run a short program and return what it prints. Raises Broken."""
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            output, errors = await child.communicate()
    except BaseException:
        if child.returncode is None:
            child.kill()
            await child.wait()
        raise
    if child.returncode:
        raise Broken(f"{' '.join(argv)}: {errors.decode('utf-8', 'replace').strip()}")
    return output


async def _unpack(chunks: AsyncIterator[bytes], path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        *("tar", "--extract", "--no-same-owner", "--directory", str(path)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None and child.stderr is not None
    try:
        try:
            async for chunk in chunks:
                child.stdin.write(chunk)
                await child.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # tar has ended early and says why
        child.stdin.close()
        errors = await child.stderr.read()
        if await child.wait():
            raise Broken(f"cannot unpack the repository: {errors.decode('utf-8', 'replace').strip()}")
    except BaseException:
        if child.returncode is None:
            child.kill()
            await child.wait()
        raise


async def _packed(path: Path) -> AsyncIterator[bytes]:
    child = await asyncio.create_subprocess_exec(
        *("tar", "--create", "--owner=0", "--group=0", "--numeric-owner", "--directory", str(path), ".git"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=READ_BYTES,
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        while chunk := await child.stdout.read(READ_BYTES):
            yield chunk
        errors = await child.stderr.read()
        if await child.wait():
            raise Broken(f"cannot pack the repository: {errors.decode('utf-8', 'replace').strip()}")
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
