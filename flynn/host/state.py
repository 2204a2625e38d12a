"""What the host must still know after a crash: jobs, volumes, sinks, settings; one SQLite file, one writing thread.

Changes are values (SQL and parameters) made by the functions at the end. `commit` hands them to the thread, which
writes everything that waits in one transaction: group commit, in the order of the calls. A `durable` commit is on disk
(fsync) before its future is done: for what a caller gets acknowledged. The others are written but not synced: they
survive the death of the daemon, and after a power cut the containers they describe are gone anyway.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from flynn.types.codec import Wire, always, decode, encode
from flynn.types.host import ActiveJob
from flynn.types.sink import SinkInfo
from flynn.types.volume import VolumeInfo

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    record BLOB NOT NULL,      -- ActiveJob as JSON
    cleaned INTEGER NOT NULL,  -- its container, address and volumes have been given back
    listed INTEGER NOT NULL,   -- 0: retired, only answers when asked for by id
    added INTEGER NOT NULL     -- order of arrival
);
CREATE TABLE IF NOT EXISTS volumes (
    id TEXT PRIMARY KEY, record BLOB NOT NULL, provider TEXT NOT NULL, place TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS sinks (id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS join_tokens (id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""

PAGE_BYTES = 4096
ROOM_PAGES = 256  # free pages of the file: some hundred records can still change on a full disk
INDEX_BYTES = 32 << 10  # of the log: of about 4000 pages
WAL_PAGES = 200  # the log goes into the file this often, so that it need not be longer than the room

Change = tuple[str, tuple[object, ...]]


class StateInUse(Exception):
    """Another daemon runs on this state directory."""


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A job as the last daemon left it."""

    job: ActiveJob
    cleaned: bool
    listed: bool


@dataclass(frozen=True, slots=True)
class KeptVolume:
    """A volume as recorded; `place` is the provider's own name for it (a data set)."""

    info: VolumeInfo
    provider: str
    place: str


class KeptToken(Wire):
    """A join token: not its secret, but the secret's digest."""

    id: str
    digest: str
    expires_at: datetime
    uses: int = always(0)  # left


@dataclass(frozen=True, slots=True)
class _Request:
    changes: Sequence[Change]
    durable: bool
    done: asyncio.Future[None]


def check(path: Path) -> None:
    """Read everything in a state file that may be in use, changing nothing.

    Raises:
        sqlite3.Error, ApiError: this version cannot use it.
    """
    if not path.exists():
        return
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as reader:
        tables = {name for (name,) in reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, kind in (
            ("jobs", ActiveJob),
            ("volumes", VolumeInfo),
            ("sinks", SinkInfo),
            ("join_tokens", KeptToken),
        ):
            if table in tables:
                for (record,) in reader.execute(f"SELECT record FROM {table}"):
                    decode(record, kind)


class StateStore:
    """The open file. Reading happens at the start and, for single retired jobs, through `retired_job`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StateInUse(f"{path} is in use by another flynn-host daemon") from error
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        self._connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # there is an index from here on
        self._index = self._allocated_index()
        self._connection.executescript(SCHEMA)
        self._make_room()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write_until_closed, name="state", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what waits and close the file."""
        self._requests.put(None)
        self._thread.join()
        self._connection.close()
        os.close(self._index)  # not before: closing any descriptor of it gives up SQLite's locks on it
        os.close(self._lock)

    def commit(self, *changes: Change, durable: bool = False) -> asyncio.Future[None]:
        """Write `changes` in one transaction; the future is done afterwards, or raises `sqlite3.Error`.

        Futures are done in the order of the calls.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._requests.put(_Request(changes, durable, done))
        return done

    # Reading

    def jobs(self) -> list[KeptJob]:
        """Return all listed jobs and those not cleaned up, oldest first."""
        rows = self._read("SELECT record, cleaned, listed FROM jobs WHERE listed OR NOT cleaned ORDER BY added, rowid")
        return [KeptJob(decode(record, ActiveJob), bool(cleaned), bool(listed)) for record, cleaned, listed in rows]

    def retired_job(self, job_id: str) -> ActiveJob | None:
        """Return one job that is no longer listed."""
        rows = self._read("SELECT record FROM jobs WHERE id = ?", job_id)
        return decode(rows[0][0], ActiveJob) if rows else None

    def volumes(self) -> list[KeptVolume]:
        """Return all recorded volumes."""
        rows = self._read("SELECT record, provider, place FROM volumes")
        return [KeptVolume(decode(record, VolumeInfo), provider, place) for record, provider, place in rows]

    def sinks(self) -> list[SinkInfo]:
        """Return all recorded log sinks."""
        return [decode(record, SinkInfo) for (record,) in self._read("SELECT record FROM sinks ORDER BY id")]

    def join_tokens(self) -> list[KeptToken]:
        """Return all join tokens, those that have ended included."""
        return [decode(record, KeptToken) for (record,) in self._read("SELECT record FROM join_tokens")]

    def setting(self, name: str, kind: type[T]) -> T | None:
        """Return one setting."""
        rows = self._read("SELECT value FROM settings WHERE name = ?", name)
        return decode(rows[0][0], kind) if rows else None

    def _read(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path)) as reader:
            return reader.execute(sql, parameters).fetchall()

    # Writing

    def _write_until_closed(self) -> None:
        while (first := self._requests.get()) is not None:
            batch, last = [first], False
            while not self._requests.empty():
                following = self._requests.get()
                if following is None:
                    last = True
                    break
                batch.append(following)
            self._write(batch)
            if last:
                return

    # Room on a full disk

    def _make_room(self) -> None:
        """Have free pages in the file and a write-ahead log of some length: both are used again before they grow."""
        try:
            for change in (*_room_taken(), *_room_given_back()):
                self._connection.execute(*change)
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.OperationalError as error:
            log.error("no room in the state file for a full disk", extra={"error": str(error)})

    def _allocated_index(self) -> int:
        """Return a descriptor of the index of the log, all of whose blocks are there.

        It is mapped into memory: a page without a block on a full disk is not an error there, but the end (SIGBUS).
        """
        index = os.open(f"{self._path}-shm", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(index, 0, max(os.fstat(index).st_size, INDEX_BYTES))
        except OSError as error:
            log.error("no room in the state file for a full disk", extra={"error": str(error)})
        return index

    async def hold_room(self) -> None:
        """Have room again, after some was used. Raises `sqlite3.Error`."""
        ((free,),) = self._read("PRAGMA freelist_count")
        if free < ROOM_PAGES // 2:
            await self.commit(*_room_taken())
            await self.commit(*_room_given_back())

    def _write(self, batch: list[_Request]) -> None:
        try:
            self._write_once(batch)
        except sqlite3.OperationalError:
            # Of a full disk, perhaps: once the log is in the file, it is written from its beginning again.
            try:
                self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
                self._write_once(batch)
            except sqlite3.Error as error:
                self._tell(batch, error)
                return
        except sqlite3.Error as error:
            self._tell(batch, error)
            return
        self._tell(batch, None)

    def _write_once(self, batch: list[_Request]) -> None:
        execute = self._connection.execute
        execute(f"PRAGMA synchronous={'FULL' if any(r.durable for r in batch) else 'NORMAL'}")
        execute("BEGIN IMMEDIATE")
        try:
            for request in batch:
                for sql, parameters in request.changes:
                    execute(sql, parameters)
            execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                execute("ROLLBACK")
            raise

    def _tell(self, batch: list[_Request], error: sqlite3.Error | None) -> None:
        if error is not None:
            log.error("state not written", extra={"error": str(error), "changes": len(batch)})
        try:
            self._loop.call_soon_threadsafe(_finish, batch, error)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more


def _finish(batch: list[_Request], error: sqlite3.Error | None) -> None:
    for request in batch:
        if request.done.done():
            continue
        if error is None:
            request.done.set_result(None)
        else:
            request.done.set_exception(error)


# The changes there are


def _room_taken() -> tuple[Change, ...]:
    return (
        ("CREATE TABLE IF NOT EXISTS room (content BLOB)", ()),
        ("INSERT INTO room VALUES (zeroblob(?))", (ROOM_PAGES * PAGE_BYTES,)),
    )


def _room_given_back() -> tuple[Change, ...]:
    return (("DELETE FROM room", ()),)


def save_job(job: ActiveJob, *, cleaned: bool = False) -> Change:
    sql = (
        "INSERT INTO jobs (id, record, cleaned, listed, added)"
        " VALUES (?1, ?2, ?3, 1, (SELECT ifnull(max(added), 0) + 1 FROM jobs))"
        " ON CONFLICT (id) DO UPDATE SET record = ?2, cleaned = ?3"
    )
    return sql, (job.job.id, encode(job), cleaned)


def retire_job(job_id: str) -> Change:
    return "UPDATE jobs SET listed = 0 WHERE id = ?", (job_id,)


def forget_retired(keep: int) -> Change:
    sql = (
        "DELETE FROM jobs WHERE NOT listed AND cleaned AND added <="
        " (SELECT added FROM jobs WHERE NOT listed ORDER BY added DESC LIMIT 1 OFFSET ?)"
    )
    return sql, (keep,)


def save_volume(volume: KeptVolume) -> Change:
    sql = "INSERT OR REPLACE INTO volumes (id, record, provider, place) VALUES (?, ?, ?, ?)"
    return sql, (volume.info.id, encode(volume.info), volume.provider, volume.place)


def forget_volume(volume_id: str) -> Change:
    return "DELETE FROM volumes WHERE id = ?", (volume_id,)


def save_sink(sink: SinkInfo) -> Change:
    return "INSERT OR REPLACE INTO sinks (id, record) VALUES (?, ?)", (sink.id, encode(sink))


def forget_sink(sink_id: str) -> Change:
    return "DELETE FROM sinks WHERE id = ?", (sink_id,)


def save_join_token(token: KeptToken) -> Change:
    return "INSERT OR REPLACE INTO join_tokens (id, record) VALUES (?, ?)", (token.id, encode(token))


def forget_join_token(token_id: str) -> Change:
    return "DELETE FROM join_tokens WHERE id = ?", (token_id,)


def save_setting(name: str, value: object) -> Change:
    return "INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)", (name, encode(value))
