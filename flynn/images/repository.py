"""A repository of signed releases in a directory, as TUF 1.0 wants it, with consistent snapshots.

    metadata/<n>.root.json  <n>.targets.json  <n>.snapshot.json  timestamp.json
    targets/<directory>/<sha256>.<name>

Files are only ever added; the new timestamp is written last and makes everything before it count. So a reader sees
one state or the next, and a publication that was interrupted is simply done again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.repository import Repository

from flynn.images.keys import ROLES, KeyProblem, KeyRing
from flynn.images.store import write_synced

HASH = "sha256"


class RepositoryProblem(Exception):
    """The repository is not as it should be, or what was asked for would damage it."""


def _days(count: int) -> timedelta:
    return timedelta(days=count)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long signatures count. A host that gets nothing newer refuses afterwards: that is what bounds a freeze."""

    root: timedelta = field(default=_days(365))
    targets: timedelta = field(default=_days(365))  # a repository without a new release for a year needs a signature
    snapshot: timedelta = field(default=_days(30))
    timestamp: timedelta = field(
        default=_days(7)
    )  # signed daily, may fail for some days; the original's one day may not

    def of(self, role: str) -> timedelta:
        lifetime = getattr(self, role)
        assert isinstance(lifetime, timedelta)
        return lifetime


@dataclass(frozen=True, slots=True)
class RootPolicy:
    """How many root keys a new repository has, and how many of them must sign."""

    keys: int = 1
    threshold: int = 1


class SignedRepository(Repository):
    """The repository in `directory`. Use it within `locked`."""

    def __init__(
        self,
        directory: Path,
        ring: KeyRing,
        *,
        lifetimes: Lifetimes | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.directory = directory
        self._ring, self._lifetimes, self._now = ring, lifetimes or Lifetimes(), now
        self._open: dict[str, Metadata[Any]] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other publications out; they wait."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._open.clear()
            yield

    @property
    def exists(self) -> bool:
        """Tell whether a first state has been published. Raises `RepositoryProblem` if a later one has lost its end."""
        if (self._metadata / "timestamp.json").exists():
            return True
        if (self._metadata / "2.targets.json").exists():
            raise RepositoryProblem(f"{self._metadata}/timestamp.json is missing; a new repository would be refused")
        return False

    def create(self, policy: RootPolicy) -> None:
        """Begin a repository: keys of every role unless there are some, the first root, no targets."""
        if not 1 <= policy.threshold <= policy.keys:
            raise RepositoryProblem(f"{policy.threshold} of {policy.keys} root keys cannot sign")
        root = Root(consistent_snapshot=True)
        for role in ROLES:
            signers = self._ring.signers(role)
            while len(signers) < (policy.keys if role == "root" else 1):
                signers.append(self._ring.create(role))
            for signer in signers:
                root.add_key(signer.public_key, role)
        root.roles["root"].threshold = policy.threshold
        self._write("root", Metadata(root))
        self._write("targets", Metadata(Targets()))
        self._publish()

    def publish(self, targets: Mapping[str, TargetFile]) -> None:
        """Sign a state that has `targets` in addition or instead; their files must have been placed."""
        with self.edit_targets() as signed:
            signed.targets.update(targets)
        self._publish()

    def renew(self, *, within: timedelta) -> list[str]:
        """Sign again what expires `within`, and the timestamp in any case; return the roles signed.

        Needs the offline keys only when root or targets are about to expire.
        """
        due = [role for role in ("root", "targets") if self._expires(role) <= self._now() + within]
        for role in due:
            with self.edit(role):
                pass
        signed_snapshot, _ = self.do_snapshot(force=self._expires("snapshot") <= self._now() + within)
        self.do_timestamp(force=True)
        return [*due, *(["snapshot"] if signed_snapshot else []), "timestamp"]

    def rotate(self, role: str) -> None:
        """Replace the keys of a role by as many new ones. The old root keys sign their own replacement."""
        root = self.root()
        old = list(root.roles[role].keyids)
        with self.edit_root() as root:
            for keyid in old:
                root.revoke_key(keyid, role)
            for _ in old:
                root.add_key(self._ring.create(role).public_key, role)
        if role == "targets":
            with self.edit_targets():
                pass
        self.do_snapshot(force=role == "snapshot")
        self.do_timestamp(force=True)
        self._ring.retire(role, old)

    # Target files

    def place(self, target: TargetFile, source: Path | bytes) -> bool:
        """Have the file of a target under its hashed name; False if it was there already."""
        path = self.file(target)
        if path.exists() and path.stat().st_size == target.length:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            write_synced(path, source)
            return True
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        try:
            beside.hardlink_to(source)  # layers are written once, under another name, and never changed
        except OSError:
            shutil.copyfile(source, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(path)
        return True

    def file(self, target: TargetFile) -> Path:
        directory, _, name = target.path.rpartition("/")
        return self.directory / "targets" / directory / f"{target.hashes[HASH]}.{name}"

    # What the library asks for

    def open(self, role: str) -> Metadata[Any]:
        """Return a copy of the current metadata of a role."""
        if role not in self._open:
            self._open[role] = self._read(role)
        return deepcopy(self._open[role])

    def close(self, role: str, md: Metadata[Any]) -> None:
        """Store the next version."""
        md.signed.version += 1
        self._write(role, md)

    @property
    def targets_infos(self) -> dict[str, MetaFile]:
        return {"targets.json": self._info("targets")}

    @property
    def snapshot_info(self) -> MetaFile:
        return self._info("snapshot")

    # Underneath

    @property
    def _metadata(self) -> Path:
        return self.directory / "metadata"

    def _publish(self) -> None:
        self.do_snapshot()
        self.do_timestamp()

    def _expires(self, role: str) -> datetime:
        expires = self.open(role).signed.expires
        assert isinstance(expires, datetime)
        return expires

    def _path(self, role: str, version: int) -> Path:
        return self._metadata / ("timestamp.json" if role == "timestamp" else f"{version}.{role}.json")

    def _info(self, role: str) -> MetaFile:
        # With the hash, who holds the online keys of one role only cannot exchange the file of another.
        version = self.open(role).signed.version
        return MetaFile.from_data(version, self._path(role, version).read_bytes(), [HASH])

    def _read(self, role: str) -> Metadata[Any]:
        """Read what counts: the newest root, else what the level above names. Leftovers of a crash do not count."""
        match role:
            case "root":
                versions = [int(file.name.partition(".")[0]) for file in self._metadata.glob("*.root.json")]
                if not versions:
                    raise RepositoryProblem(f"{self.directory} is no repository: it has no root")
                version = max(versions)
            case "targets":
                version = self.snapshot().meta["targets.json"].version
            case "snapshot":
                version = self.timestamp().snapshot_meta.version
            case _:
                version = 0
        path = self._path(role, version)
        try:
            return Metadata.from_bytes(path.read_bytes())
        except FileNotFoundError:
            if role in ("snapshot", "timestamp") and not (self._metadata / "timestamp.json").exists():
                # The first of its kind: version 0, which nobody sees.
                signed: Snapshot | Timestamp = Snapshot() if role == "snapshot" else Timestamp()
                signed.version = 0
                if isinstance(signed, Timestamp):
                    signed.snapshot_meta.version = 0
                else:
                    signed.meta["targets.json"].version = 0
                return Metadata(signed)
            raise RepositoryProblem(f"{path} is missing") from None
        except DeserializationError as error:
            raise RepositoryProblem(f"{path} is damaged: {error}") from error

    def _write(self, role: str, metadata: Metadata[Any]) -> None:
        """Sign with every key of the role at hand and store. Raises `KeyProblem` if they are too few."""
        signed = metadata.signed
        signed.expires = (self._now() + self._lifetimes.of(role)).replace(microsecond=0)
        before = self._open.get("root")
        root = signed if role == "root" else self.root()
        trusted = set(root.roles[role].keyids)
        if role == "root" and before is not None:
            trusted |= set(before.signed.roles["root"].keyids)  # the hosts trust the root before this one
        metadata.signatures.clear()
        for signer in self._ring.signers(role):
            if signer.public_key.keyid in trusted:
                metadata.sign(signer, append=True)
        for judge in [root] if before is None or role != "root" else [root, before.signed]:
            result = judge.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            if not result:
                found = f"{len(result.signed)} of the keys that sign {role} are in {self._ring.directory(role)}"
                raise KeyProblem(f"cannot sign {role}: {found}, {result.threshold} are needed")
        self._metadata.mkdir(parents=True, exist_ok=True)
        path = self._path(role, signed.version)
        write_synced(path, metadata.to_bytes())
        path.chmod(0o644)
        self._open[role] = deepcopy(metadata)
