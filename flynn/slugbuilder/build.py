"""The build, step by step: from a tar of source code on standard input to a slug in the blobstore.

    prepare > unpack > fetch the cache > copy > .slugignore > choose a buildpack > compile > release > types >
    squash > upload > save the cache

The slug is a squashfs layer whose `/app` holds the app. It goes to a signed URL, and a description of it
(`Result`) to another one; whoever started the build checks the description against what the blobstore measured, and
makes the artifact and the release. spec/build-pipeline.md section 4.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from flynn.slugbuilder import buildpacks, procfile, slugignore
from flynn.slugbuilder.buildpacks import Account, Buildpack, StepFailed
from flynn.slugbuilder.output import headline, human_size, indented
from flynn.slugbuilder.settings import CLONE_PROXIES, ENV_DIR_COOKIE, SLUG_USER, Settings
from flynn.slugbuilder.transfer import SignedTransfers, TransferFailed

SQUASH = ("-noappend", "-no-progress", "-comp", "zstd", "-Xcompression-level", "6")
"""Level 6 halves the time of the default 15 for a twentieth more bytes: a push waits for it."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the build, as told to whoever started it. Written by a job nobody trusts."""

    sha512_256: str  # of the layer, hex
    length: int  # of the layer, bytes
    process_types: Mapping[str, str]  # type -> command
    detected: str  # what the buildpack calls the app


class Build:
    """One build. `run` may be called once."""

    def __init__(self, settings: Settings, source: IO[bytes], show: IO[bytes]) -> None:
        self._settings = settings
        self._source = source
        self._show = show
        self._transfers = SignedTransfers(settings.ca_pem)
        self._account = Account(settings.uid or None, settings.buildpack_environment())

    def run(self) -> Result:
        """Do all of it. Raises StepFailed, Malformed or TransferFailed."""
        self._prepare()
        self._unpack()
        self._fetch_cache()
        self._account.run("cp", "-a", f"{self._settings.source}/.", self._settings.build)
        self._apply_slugignore()
        self._install_ssh_key()
        buildpack, detected = self._choose_buildpack()
        self._headline(f"{detected} app detected")
        buildpack.compile(self._account, self._arguments(), self._show)
        types = self._discover_types(buildpack, detected)
        slug = self._squash()
        result = Result(_sha512_256(slug), slug.stat().st_size, types, detected)
        self._upload(slug, result)
        self._save_cache()
        return result

    def _headline(self, text: str) -> None:
        self._show.write(headline(text))
        self._show.flush()

    def _line(self, text: str) -> None:
        self._show.write(indented(text.encode()))
        self._show.flush()

    def _arguments(self) -> list[Path]:
        arguments = [self._settings.build, self._settings.cache]
        return [*arguments, self._settings.env_dir] if self._settings.env_dir.exists() else arguments

    # The steps.

    def _prepare(self) -> None:
        settings = self._settings
        for directory in (settings.source, settings.build, settings.cache, settings.temporary):
            directory.mkdir(parents=True, exist_ok=True)
            if settings.uid:
                os.chown(directory, settings.uid, settings.uid)
        link = settings.app_link
        if link is not None and not link.is_symlink():
            if link.is_dir():
                link.rmdir()
            link.symlink_to(settings.source)

    def _unpack(self) -> None:
        """The source, and possibly a second archive behind it that holds the app's configuration."""
        settings = self._settings
        flags = ("-x", "-m", "--ignore-zeros", "--no-same-owner")
        self._account.run("tar", *flags, "-C", settings.source, stdin=self._source)
        cookie = settings.source / ENV_DIR_COOKIE
        if cookie.is_dir():
            cookie.rename(settings.env_dir)

    def _fetch_cache(self) -> None:
        """An unreadable cache only costs time, so every failure of it is passed over."""
        settings = self._settings
        if not settings.cache_get_url:
            return
        archive = settings.work / "cache.tgz"
        try:
            if self._transfers.download(settings.cache_get_url, archive):
                with archive.open("rb") as file:
                    self._account.run("tar", "-x", "-z", "--no-same-owner", "-C", settings.cache, stdin=file)
        except (TransferFailed, StepFailed) as error:
            self._line(f"WARN: the build cache could not be used: {error}")
        archive.unlink(missing_ok=True)

    def _apply_slugignore(self) -> None:
        try:
            text = (self._settings.build / slugignore.FILE_NAME).read_text("utf-8", "replace")
        except (FileNotFoundError, IsADirectoryError):
            return
        matches = slugignore.matches(self._settings.build, slugignore.patterns(text))
        if matches:
            count = sum(slugignore.remove(path) for path in matches)
            self._headline(f"Deleting {count} files matching .slugignore patterns.")

    def _install_ssh_key(self) -> None:
        """For custom buildpacks and private dependencies; it is in the builder's home, not in the slug."""
        settings = self._settings
        files = {"id_rsa": settings.ssh_client_key, "known_hosts": settings.ssh_client_hosts}
        if not any(files.values()):
            return
        directory = settings.source / ".ssh"
        directory.mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            if content:
                path = directory / name
                path.unlink(missing_ok=True)
                path.touch(mode=0o600)
                path.write_text(content.rstrip("\n") + "\n")
        if settings.uid:
            for path in (directory, *directory.iterdir()):
                os.chown(path, settings.uid, settings.uid, follow_symlinks=False)

    def _choose_buildpack(self) -> tuple[Buildpack, str]:
        settings = self._settings
        if url := settings.buildpack_url:
            self._headline("Fetching custom buildpack")
            buildpack = buildpacks.by_name(settings.buildpacks, url) or self._clone(url)
            detected = buildpack.detect(self._account, settings.build)
            if detected is None:
                self._headline(f"The buildpack {url} does not recognise this app")
                raise StepFailed(1)
            return buildpack, detected
        for buildpack in buildpacks.built_in(settings.buildpacks):
            if (detected := buildpack.detect(self._account, settings.build)) is not None:
                return buildpack, detected
        self._headline("Unable to select a buildpack")
        raise StepFailed(1)

    def _clone(self, url: str) -> Buildpack:
        address, _ = buildpacks.split_url(url)
        name = address.rstrip("/").rpartition("/")[2].removesuffix(".git") or "buildpack"
        parent = self._settings.work / "buildpacks"
        parent.mkdir(exist_ok=True)
        if self._settings.uid:
            os.chown(parent, self._settings.uid, self._settings.uid)
        proxies: dict[str, str] = {}
        for variable in CLONE_PROXIES:
            file = self._settings.env_dir / variable
            if file.is_file():
                proxies[variable] = file.read_text("utf-8", "replace").strip()
        return buildpacks.clone(self._account, url, parent / f"custom_{name}", proxies)

    def _discover_types(self, buildpack: Buildpack, detected: str) -> dict[str, str]:
        settings = self._settings
        raw = buildpack.release(self._account, self._arguments()[:2])
        release_file = settings.build / ".release"
        _replace(release_file, raw)
        self._headline("Discovering process types")
        release = procfile.parse_release(raw.decode("utf-8", "replace"))
        declared: dict[str, str] = {}
        path = settings.build / "Procfile"
        if path.is_file():
            declared = procfile.parse_procfile(path.read_text("utf-8", "replace"))
            self._line("Procfile declares types -> " + ", ".join(declared))
        if release.default_process_types:
            names = ", ".join(sorted(release.default_process_types))
            self._line(f"Default process types for {detected} -> {names}")
        return procfile.process_commands(declared, release.default_process_types)

    def _squash(self) -> Path:
        settings = self._settings
        _write_accounts(settings.root / "etc", settings.uid)
        if settings.uid:
            self._own(settings.build)
        slug = settings.work / "slug.squashfs"
        slug.unlink(missing_ok=True)
        done = subprocess.run(
            ["mksquashfs", settings.root, slug, *SQUASH], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            sys.stderr.buffer.write(done.stdout)
            raise StepFailed(buildpacks.exit_status(done.returncode), "mksquashfs failed")
        return slug

    def _own(self, tree: Path) -> None:
        """Give all of `tree` to the slug's user: a buildpack may have unpacked archives with other owners."""
        uid = self._settings.uid
        for folder, directories, files in os.walk(tree):
            for name in (*directories, *files):
                path = os.path.join(folder, name)
                if os.lstat(path).st_uid != uid:
                    os.chown(path, uid, uid, follow_symlinks=False)

    def _upload(self, slug: Path, result: Result) -> None:
        self._headline("Uploading slug to blobstore")

        def warn(attempt: int, error: Exception) -> None:
            self._line(f"WARN: error uploading to blobstore (attempt {attempt} of 3): {error}")

        self._transfers.upload(slug, self._settings.slug_put_url, warn)
        description = self._settings.work / "result.json"
        description.write_text(json.dumps(asdict(result)))
        self._transfers.upload(description, self._settings.result_put_url, warn)
        self._headline(f"Compiled slug size is {human_size(result.length)}")

    def _save_cache(self) -> None:
        """The slug is safe by now, so a cache that cannot be saved is a warning."""
        settings = self._settings
        if not settings.cache_put_url:
            return
        archive = settings.work / "cache.tgz"
        packer = "pigz -1" if shutil.which("pigz") else "gzip -1"
        try:
            Account(None, os.environ).run("tar", "-c", "-I", packer, "-f", archive, "-C", settings.cache, ".")
            self._transfers.upload(archive, settings.cache_put_url)
        except (TransferFailed, StepFailed) as error:
            self._line(f"WARN: the build cache was not saved: {error}")


def _replace(path: Path, content: bytes) -> None:
    """Write a file where user code may have left anything, even a symbolic link out of the tree."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(content)


def _write_accounts(etc: Path, uid: int) -> None:
    """Let the slug's user have a name in the running app, whatever image it runs on."""
    etc.mkdir(exist_ok=True)
    for name, entry in (
        ("passwd", f"{SLUG_USER}:x:{uid}:{uid}:Flynn slug user:/app:/bin/bash"),
        ("group", f"{SLUG_USER}:x:{uid}:"),
    ):
        lines = Path("/etc", name).read_text().splitlines()
        if uid and not any(line.split(":")[2] == str(uid) for line in lines if line.count(":") > 2):
            lines.append(entry)
        (etc / name).write_text("\n".join(lines) + "\n")


def _sha512_256(path: Path) -> str:
    digest = hashlib.new("sha512_256")
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
