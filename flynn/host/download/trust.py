"""What this host trusts: roots, and the newest state it has seen, below `<state dir>/tuf`.

    metadata/root_history/<n>.root.json  timestamp.json  snapshot.json  targets.json
    parts/<sha256>                       files on their way; a download that broke off goes on from here

Trust begins with a root that an operator gives, or that was installed as `<config dir>/tuf-root.json`. It is never
taken from the repository, nor from whoever asks for a download. From there on hosts follow the repository by
themselves, key rotations included (The Update Framework 1.0, section 5).
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root, TargetFile
from tuf.ngclient import Updater, UpdaterConfig

from flynn.host.download.errors import DownloadFailed, NotReleased, NoTrust, Reason, Refused, Unavailable
from flynn.host.download.fetch import Fetcher, Limits, address_of, source_of

ROOT_FILE = "tuf-root.json"
ABANDONED_SECONDS = 7 * 86400.0
MAX_SMALL_BYTES = 16 << 20  # of a file that is read into memory

# A metadata file of this size has some ten thousand targets; what is more is an attack.
_CONFIG = UpdaterConfig(targets_max_length=8_000_000, snapshot_max_length=100_000, root_max_length=200_000)


class TrustedRepository:
    """A repository as seen by a host that trusts nobody but its root. Blocking; several threads may fetch at once.

    All methods raise `DownloadFailed`.
    """

    def __init__(
        self,
        repository: str,
        state: Path,
        *,
        roots: tuple[Path, ...] = (),
        limits: Limits | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`state` is what the host trusts; if it is nothing yet, the first of `roots` that exists is the beginning."""
        self.address = address_of(repository)
        self._limits = limits or Limits()
        self._source = source_of(repository, self._limits)
        self._fetcher = Fetcher(self._source, self._limits, sleep)
        self._state, self._roots = state, roots
        self._updater: Updater | None = None

    def cut(self) -> None:
        """Break everything off, from another thread."""
        self._source.cut()

    def trust(self, root: Path) -> None:
        """Begin to trust a root the operator names. Naming again what is trusted already does no harm."""
        with self._locked():
            given = _read_root(root)
            if not self._begun:
                self._begin(given)
                return
            history = self._metadata / "root_history"
            if not any(known.read_bytes() == given for known in history.glob("*.root.json")):
                raise NoTrust(
                    f"this host trusts another root than {root}; "
                    f"remove {self._state} if it is to trust this one, and only this one, from now on"
                )

    def refresh(self) -> None:
        """Follow the repository to its present state."""
        with self._locked():
            if not self._begun:
                self._begin(self._first_root())
            with self._explained("the repository's metadata"):
                updater = Updater(
                    metadata_dir=str(self._metadata),
                    metadata_base_url="metadata",
                    target_base_url="targets",
                    fetcher=self._fetcher,
                    config=_CONFIG,
                    bootstrap=None,  # the root this host came to trust by now
                )
                updater.refresh()
        self._updater = updater

    def find(self, name: str) -> TargetFile:
        """Return what was signed about a file."""
        if self._updater is None:
            self.refresh()
        assert self._updater is not None
        with self._explained(name):
            target = self._updater.get_targetinfo(name)
        if target is None:
            raise NotReleased(f"{self.address} has not signed any {name}")
        return target

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        target = self.find(name)
        if target.length > MAX_SMALL_BYTES:
            raise Refused(Reason.ENDLESS, name, f"{target.length} bytes are signed, at most {MAX_SMALL_BYTES} expected")
        with self._explained(name):
            content = self._fetcher.download_bytes(_path(target), target.length)
            target.verify_length_and_hashes(content)
        return content

    def fetch(self, name: str, into: Path) -> None:
        """Download a file; `into`, on the same file system, is there when its content is complete and verified.

        Goes on where an earlier download broke off.
        """
        target = self.find(name)
        parts = self._state / "parts"
        part = parts / next(iter(target.hashes.values()))
        lock = parts / f"{part.name}.lock"
        with self._explained(name):
            parts.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _exclusive(lock):
                begun = part.exists() and 0 < part.stat().st_size <= target.length
                try:
                    self._fill(part, target, anew=not begun)
                except (LengthOrHashMismatchError, DownloadLengthMismatchError):
                    part.unlink(missing_ok=True)
                    if not begun:
                        raise
                    self._fill(part, target, anew=True)  # the beginning may have been from somewhere else
                part.rename(into)
                lock.unlink(missing_ok=True)  # who waits for it verifies what he downloads, too

    def fetch_beside(self, name: str) -> Path:
        """Download a file to a place of its own, from where the caller takes it to another file system."""
        into = self._state / "parts" / f"fetched-{os.getpid()}-{threading.get_ident()}"
        self.fetch(name, into)
        return into

    def sweep(self) -> None:
        """Remove beginnings of downloads that nobody has gone on with."""
        for file in (self._state / "parts").glob("*"):
            if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink(missing_ok=True)

    def _fill(self, part: Path, target: TargetFile, *, anew: bool) -> None:
        with part.open("wb" if anew else "ab") as file:
            size = file.tell()
            if size < target.length:
                for chunk in self._fetcher.chunks(_path(target), size):
                    size += len(chunk)
                    if size > target.length:
                        raise DownloadLengthMismatchError(f"more than the {target.length} bytes that were signed")
                    file.write(chunk)
        with part.open("rb") as file:
            target.verify_length_and_hashes(file)

    # Underneath

    @property
    def _metadata(self) -> Path:
        return self._state / "metadata"

    @property
    def _begun(self) -> bool:
        """Tell whether there is a root, and have `root.json` lead to the newest one that a power cut has left whole."""
        history = self._metadata / "root_history"
        for file in sorted(
            history.glob("*.root.json"), key=lambda file: int(file.name.partition(".")[0]), reverse=True
        ):
            try:
                _read_root(file)
            except NoTrust:
                continue  # the repository has it still, signed by the one before
            self._link(file.name)
            return True
        return False

    def _first_root(self) -> bytes:
        for file in self._roots:
            if file.exists():
                return _read_root(file)
        places = " or ".join(map(str, self._roots)) or "a file"
        raise NoTrust(f"this host trusts no repository yet: put the root of {self.address} into {places}, or name it")

    def _begin(self, root: bytes) -> None:
        """Store the first root so that a crash leaves either nothing or all of it."""
        history = self._metadata / "root_history"
        history.mkdir(mode=0o700, parents=True, exist_ok=True)
        version = Metadata[Root].from_bytes(root).signed.version
        beside = history / ".new"
        beside.write_bytes(root)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(history / f"{version}.root.json")
        self._link(f"{version}.root.json")

    def _link(self, name: str) -> None:
        link = self._metadata / ".root"
        link.unlink(missing_ok=True)
        link.symlink_to(f"root_history/{name}")
        link.rename(self._metadata / "root.json")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process and thread at a time changes what the host trusts."""
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _exclusive(self._state / "lock"):
                yield
        except OSError as error:
            raise DownloadFailed(f"{self._state}: {error}") from error

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn the library's errors into ours."""
        what = f"{what} from {self.address}"
        try:
            yield
        except ExpiredMetadataError as error:
            raise Refused(Reason.EXPIRED, what, f"{error}; this host's clock says {_clock()}") from error
        except BadVersionNumberError as error:
            raise Refused(Reason.ROLLBACK, what, str(error)) from error
        except UnsignedMetadataError as error:
            raise Refused(Reason.SIGNATURE, what, str(error)) from error
        except LengthOrHashMismatchError as error:
            raise Refused(Reason.MISMATCH, what, str(error)) from error
        except RepositoryError as error:
            raise Refused(Reason.MALFORMED, what, str(error)) from error
        except DownloadLengthMismatchError as error:
            raise Refused(Reason.ENDLESS, what, str(error)) from error
        except SlowRetrievalError as error:
            raise Refused(Reason.SLOW, what, str(error)) from error
        except DownloadHTTPError as error:
            raise Unavailable(f"{what}: {error}") from error
        except DownloadError as error:
            raise Unavailable(f"{what}: {error}") from error
        except OSError as error:
            raise DownloadFailed(f"{what}: {error}") from error


def _path(target: TargetFile) -> str:
    """Where a file is below the repository: under the name of its content, so that two states do not mix."""
    directory, slash, name = target.path.rpartition("/")
    return f"targets/{directory}{slash}{next(iter(target.hashes.values()))}.{name}"


def _read_root(file: Path) -> bytes:
    """Read a root and check that it is one, signed by its own keys."""
    try:
        content = file.read_bytes()
        root = Metadata[Root].from_bytes(content)
        if not isinstance(root.signed, Root):
            raise NoTrust(f"{file} is no root but {root.signed.type} metadata")
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except FileNotFoundError:
        raise NoTrust(f"there is no root in {file}") from None
    except (OSError, RepositoryError, ValueError) as error:
        raise NoTrust(f"{file} is no root: {error}") from error
    return content


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
