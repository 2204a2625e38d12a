"""PostgreSQL as a sirenia database.

`apply` brings the server to a configuration, `hold` lets it acknowledge nothing. The endless tasks: `keep_running`
starts it again when it ends by itself, `keep_in_step` watches over replication (it notes when the downstream has
caught up; a standby that cannot follow its upstream is rewound or copied), `keep_certificate` hands renewed
certificates on. All of them, and `stop`, take turns by one lock.

How an acknowledged write comes to be on two disks: the server waits for the confirmation of exactly one standby, named
by its logical identity, from the moment it may write at all. Until there is one, it waits for a standby that does not
exist. So `default_transaction_read_only`, which clients can override, is there to tell them, not to be relied upon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import psycopg
from psycopg import AsyncConnection

from flynn.aio.backoff import Backoff
from flynn.appliances.postgresql import queries, wal
from flynn.appliances.postgresql.configuration import NOBODY
from flynn.appliances.postgresql.following import DataDirectory
from flynn.appliances.postgresql.postmaster import Postmaster, ensure_data_directory
from flynn.appliances.postgresql.queries import Answer, Connection
from flynn.appliances.postgresql.workplace import Mode, ServerConfig, Workplace
from flynn.appliances.sirenia.cluster_state import Lineage, Role
from flynn.appliances.sirenia.database import STARTING, DatabaseConfig, DatabaseError, DatabaseInfo, Held
from flynn.identity import Identity
from flynn.types.instance import Instance

log = logging.getLogger(__name__)

START_LIMIT = timedelta(minutes=5)  # replaying the log after a crash takes its time
START_POLL = timedelta(milliseconds=50)
INFO_LIMIT = timedelta(seconds=2)  # a status never waits longer for the server
CERTIFICATE_CHECK = timedelta(seconds=60)  # certificates are renewed hours before they end
RESTART = Backoff(first=timedelta(milliseconds=100), factor=2, limit=timedelta(seconds=10))
STEADY = timedelta(minutes=1)  # a server that ran so long starts with the shortest pause again

STANDBY_START_LIMIT = timedelta(minutes=1)  # the first time, twice as long each time after: it may have much to replay
COPYING = "-copy"
HOLD_LIMIT = timedelta(seconds=8)  # longer than queries on a standby may delay its replay
ASK_LIMIT = timedelta(seconds=20)  # for another server to answer, a checkpoint included
BROKEN_STARTS = 3  # a server that was short of something may start the next time
STEP_REST = timedelta(milliseconds=500)
STEP_POLL = timedelta(milliseconds=100)  # while the downstream catches up, and everybody waits
STEADY_SAMPLES = 3  # in a row, of a stream that really flows
STUCK = timedelta(seconds=10)  # a standby that gets nothing so long from an upstream that answers has lost its way


class EndedDuringStart(DatabaseError):
    """The server did not hang, it gave up: on its data, its configuration, or what the machine has left."""


class NotReadyInTime(DatabaseError):
    """The server was stopped again because it did not let clients in within the limit."""


class PostgreSQL:
    """Implements `sirenia.database.Database`. The `keep_` methods belong to a supervisor."""

    zero_position = wal.ZERO

    def __init__(self, config: ServerConfig, identity: Identity | None) -> None:
        self._config = config
        self._workplace = Workplace(config, identity)
        self._directory = DataDirectory(config.data, config.installation)
        self._wanted: DatabaseConfig | None = None
        self._applied: DatabaseConfig | None = None  # what the server has been brought to; None = nobody knows
        self._mode = Mode(standby=True, upstream=None, sync=NOBODY, read_only=True, replicated=True)
        self._synced: Instance | None = None  # the downstream, once it was seen to have caught up
        self._target = ""  # the log position it has to reach for that
        self._rejoins = 0  # how often this standby was rewound or copied without getting through to its upstream
        self._failed_starts = 0  # how often in a row no server would start on the data of a standby
        self._slow_starts = 0  # how often in a row a standby's server was not ready in time
        self._launched: DatabaseConfig | None = None  # what the server of a standby was started for
        self._held = False
        self._detail = ""
        self._postmaster: Postmaster | None = None
        self._became_ready = asyncio.Event()  # the superuser can come in with the password of the environment
        self._moved = asyncio.Event()  # something was applied
        self._lock = asyncio.Lock()  # one start, stop or reload at a time
        self._news = 0  # how often something else was asked for, or may be soon
        self._heard = 0  # what `_news` was when the present holder of the lock made up his mind
        self._probe: Connection | None = None
        self._probing = asyncio.Lock()  # one query at a time on the probe's connection
        self._asking: asyncio.Timeout | None = None  # the limit of that query

    # --- what sirenia asks for

    def compare(self, a: str, b: str) -> int:
        return wal.compare(a, b)

    async def apply(self, config: DatabaseConfig) -> None:
        self.reconsider()  # the holder of the lock may wait for a server that is to be another one by now
        async with self._turn():
            self._wanted, self._held = config, False
            try:
                await self._bring_to(config)
            finally:
                self._detail = ""

    def reconsider(self) -> None:
        self._news += 1

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Hold the lock; waiting for a standby's server ends when there are news since this was called."""
        news = self._news
        async with self._lock:
            self._heard = news
            yield

    async def hold(self) -> Held:
        async with self._lock:
            if not self._running or not self._became_ready.is_set():
                raise DatabaseError("the server does not run")
            self._applied, self._synced, self._held = None, None, True
            try:
                async with asyncio.timeout(HOLD_LIMIT.total_seconds()):
                    return await (self._hold_standby() if self._mode.standby else self._hold_primary())
            except (psycopg.Error, OSError, TimeoutError) as error:
                raise DatabaseError(f"cannot hold the server: {error or 'it takes too long'}") from error

    async def enable_writes(self, generation: int) -> None:
        async with self._lock:
            config = self._applied
            if config is None or config.role is not Role.PRIMARY or _generation(config) != generation:
                return
            if self._running and self._synced is not None and self._mode.read_only:
                self._configure(replace(self._mode, read_only=False))
                log.info("writes are enabled", extra={"generation": generation})

    async def record_lineage(self, lineage: Lineage) -> None:
        self._directory.record(lineage)

    def interrupt(self) -> None:
        self._directory.interrupted.set()

    async def stop(self) -> None:
        async with self._lock:
            self._wanted = None
            await self._stop()

    async def info(self) -> DatabaseInfo:
        running = self._running
        answer = Answer()
        if running:
            try:
                answer = await self._answer()
            except (psycopg.Error, TimeoutError, OSError) as error:
                log.debug("the server does not answer", extra={"error": error})
        return DatabaseInfo(
            config=self._wanted,
            running=running,
            synced_downstream=self._synced,
            xlog=answer.position,
            user_exists=answer.user_exists,
            read_write=answer.read_write
            and self._became_ready.is_set(),  # those who wait for this connect as the superuser next
            connected=self._connected(answer),
            lineage=self._directory.lineage,
            timeline=answer.timeline,
            detail=self._detail,
        )

    def _connected(self, answer: Answer) -> list[str]:
        upstream = self._mode.upstream
        streaming = upstream is not None and answer.sender == (upstream.host, upstream.port)
        return [*answer.standbys, *([self._identity_of(upstream)] if streaming and upstream else [])]

    def _identity_of(self, instance: Instance) -> str:
        return instance.meta.get(self._config.id_key) or instance.id

    # --- endless tasks

    async def keep_running(self) -> None:
        """Start the server again whenever it ends without having been asked to.

        A server that never became ready is the caller's of `apply`, who was told and tries again.
        """
        loop = asyncio.get_running_loop()
        delays = RESTART.delays()
        while True:
            await self._became_ready.wait()
            postmaster, began = self._postmaster, loop.time()
            if postmaster is None:
                continue  # stopped again before it was our turn
            status = await postmaster.exited()
            async with self._lock:
                if self._postmaster is not postmaster:
                    continue  # it was stopped on purpose, and maybe another one runs by now
                self._became_ready.clear()
                self._applied, self._synced = None, None
                log.error("the server ended by itself", extra={"pid": postmaster.pid, "status": status})
            if loop.time() - began > STEADY.total_seconds():
                delays = RESTART.delays()
            back = False
            while not back:
                await asyncio.sleep(next(delays))
                back = await self._back_again()

    async def _back_again(self) -> bool:
        """Start the server if it is wanted and not there; False if that failed."""
        async with self._turn():
            ready = self._running and self._became_ready.is_set()
            if ready or self._held or self._wanted is None or self._wanted.role is Role.NONE:
                return True  # one that was held comes back by `apply` only: until then it must not acknowledge
            try:
                await self._bring_to(self._wanted)
            except DatabaseError as error:
                log.error("the server did not start again", extra={"error": error})
                return False
            return True

    async def keep_certificate(self) -> None:
        """Let the server present a renewed certificate to new connections."""
        if self._workplace.identity is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK.total_seconds())
            async with self._lock:
                if self._workplace.copy_certificate() and self._postmaster is not None and self._postmaster.running:
                    log.info("certificate renewed")
                    self._postmaster.reload()

    async def keep_in_step(self) -> None:
        """See how replication gets on: enable writes when the downstream has caught up, help a standby that is lost."""
        loop = asyncio.get_running_loop()
        flowing, samples = loop.time(), 0
        while True:
            waiting = self._applied is not None and self._applied.downstream is not None and self._synced is None
            try:
                async with asyncio.timeout((STEP_POLL if waiting else STEP_REST).total_seconds()):
                    await self._moved.wait()
            except TimeoutError:
                pass
            self._moved.clear()
            config = self._applied
            if config is None or self._lock.locked() or not self._became_ready.is_set():
                flowing = loop.time()
                continue
            async with self._turn():
                if self._applied is not config or not self._running:
                    continue
                try:
                    if config.downstream is not None and self._synced is None:
                        await self._check_downstream(config.downstream)
                    # One that went another way is let in for a moment again and again.
                    samples = samples + 1 if not self._mode.standby or await self._is_streaming() else 0
                    if samples > STEADY_SAMPLES:
                        flowing, self._rejoins = loop.time(), 0
                    elif loop.time() - flowing > STUCK.total_seconds():
                        await self._find_the_way(config)
                        flowing = loop.time()
                except (psycopg.Error, OSError) as error:
                    log.debug("cannot look after replication", extra={"error": error})
                except DatabaseError as error:
                    log.error("cannot follow the upstream", extra={"error": error})
                    self._applied = None
            if self._applied is None:
                await self._go_on()
                flowing = loop.time()

    async def _go_on(self) -> None:
        """Start the server that was stopped to find its way, and found none; nothing else may happen for long."""
        for delay in RESTART.delays():
            try:
                async with asyncio.timeout(delay):
                    await self._moved.wait()
            except TimeoutError:
                pass
            self._moved.clear()
            if await self._back_again():
                return

    # --- becoming what is wanted; the lock is held

    @property
    def _running(self) -> bool:
        return self._postmaster is not None and self._postmaster.running

    async def _bring_to(self, config: DatabaseConfig) -> None:
        if self._running and self._became_ready.is_set() and self._unchanged(config):
            self._applied = config
            return
        self._applied, self._synced, self._target = None, None, ""
        match config.role:
            case Role.NONE:
                await self._stop()
            case Role.PRIMARY:
                await self._become_primary(config)
            case Role.SYNC | Role.ASYNC:
                await self._become_standby(config)
            case _:
                raise DatabaseError(f"a database cannot be {config.role}")
        self._applied = config
        self._moved.set()

    def _unchanged(self, config: DatabaseConfig) -> bool:
        """Whether only things differ that the server does not know of, such as the end of the chain."""
        known = self._applied
        if known is None or config.role is Role.NONE:
            return False
        primary, was_primary = config.role is Role.PRIMARY, known.role is Role.PRIMARY
        if primary != was_primary or (primary and _generation(known) != _generation(config)):
            return False
        return (_address(known.upstream), _address(known.downstream)) == (
            _address(config.upstream),
            _address(config.downstream),
        )

    async def _become_primary(self, config: DatabaseConfig) -> None:
        state, downstream = config.state, config.downstream
        assert state is not None  # nobody is primary without a state
        if downstream is None and not state.singleton:
            raise DatabaseError("a primary needs a downstream, unless it is the only member of its cluster")
        mode = Mode(
            standby=False,
            upstream=None,
            sync=self._identity_of(downstream) if downstream else "",
            read_only=not state.singleton,
            replicated=not state.singleton,
        )
        if self._running and not self._became_ready.is_set():
            await self._stop()
        if self._running:
            changes_alone = bool(self._mode.sync) != bool(mode.sync)
            was_standby = self._mode.standby
            if changes_alone and not was_standby:
                await self._restart(mode)
            else:
                self._configure(mode)
        else:
            lineage = self._directory.lineage
            if not self._directory.exists and lineage is not None:
                raise DatabaseError("the data of this primary are missing, and a new database would not be the same")
            self._workplace.prepare()
            await ensure_data_directory(self._config.installation, self._directory.path)
            await self._start(mode)
        if not state.singleton or self._directory.lineage is not None:
            self._directory.record(Lineage(generation=state.generation, primary=self._config.peer_id))
        if self._directory.is_standby:
            await self._promote()
        await self._ensure_superuser()
        self._became_ready.set()
        log.info("the server is ready", extra={"role": config.role, "port": self._config.port})

    async def _become_standby(self, config: DatabaseConfig) -> None:
        upstream = config.upstream
        if upstream is None:
            raise DatabaseError(f"{config.role} without an upstream")
        mode = Mode(standby=True, upstream=upstream, sync=NOBODY, read_only=True, replicated=True)
        ready = self._became_ready.is_set()
        if self._running and (not self._mode.standby or not (ready or self._starts_for(config))):
            await self._stop()
        if self._running and ready:
            self._configure(mode)
            return
        if not self._running:
            self._workplace.prepare()
            if not self._directory.exists:
                await self._copy(upstream)
            elif not self._directory.is_standby:
                await self._rewind_or_copy(config, upstream)
        try:
            await self._start_standby(config, mode)
        except EndedDuringStart as error:
            await self._replace_broken(config, upstream, error)
            await self._start_standby(config, mode)
        self._failed_starts = 0
        self._became_ready.set()
        log.info("the server is ready", extra={"role": config.role, "upstream": upstream.addr})

    def _starts_for(self, config: DatabaseConfig) -> bool:
        """Whether a standby's server that is not ready yet waits for what the new configuration asks for as well."""
        launched = self._launched
        return launched is not None and (_generation(launched), _address(launched.upstream)) == (
            _generation(config),
            _address(config.upstream),
        )

    async def _start_standby(self, config: DatabaseConfig, mode: Mode) -> None:
        """Have a standby's server run and let clients in, after a start that it has begun or a new one.

        Before it does, it may have to receive log, from an upstream that has died meanwhile. So the wait ends with
        DatabaseError as soon as there are news; the server goes on, until it is known that they concern it.
        """
        limit = STANDBY_START_LIMIT * (1 << self._slow_starts)
        self._detail = STARTING
        try:
            if not self._running:
                await self._launch(mode)
                self._launched = config
            await self._until_ready(limit, heed_news=True)
        except NotReadyInTime:
            self._slow_starts = min(self._slow_starts + 1, 5)
            raise
        finally:
            self._detail = ""
        self._slow_starts = 0

    async def _replace_broken(self, config: DatabaseConfig, upstream: Instance, error: EndedDuringStart) -> None:
        """A standby whose data no server starts on gets a new copy, as long as there is a primary that has it all."""
        self._failed_starts += 1
        state = config.state
        assert state is not None  # nobody has an upstream without a state
        if self._failed_starts < BROKEN_STARTS or await self._asked(state.primary) is not False:
            raise error
        log.error("the data are taken for broken", extra={"starts": self._failed_starts, "error": error})
        await self._copy(upstream)

    async def _find_the_way(self, config: DatabaseConfig) -> None:
        """A standby gets nothing from an upstream that is well: take its data back to where they went apart."""
        upstream = config.upstream
        if upstream is None or await self._asked(upstream) is None:
            return
        self._rejoins += 1
        log.warning("the upstream does not send", extra={"upstream": upstream.addr, "attempt": self._rejoins})
        mode = self._mode
        await self._stop()
        if self._rejoins == 1:
            await self._rewind_or_copy(config, upstream)
        else:
            await self._copy(upstream)
        await self._start_standby(config, mode)
        self._became_ready.set()

    async def _rewind_or_copy(self, config: DatabaseConfig, upstream: Instance) -> None:
        """Take back what the cluster does not have. Until there is a primary again, nothing is taken back."""
        state = config.state
        assert state is not None  # nobody has an upstream without a state
        assert state.primary is not None  # a state without one is not parsed
        # Standbys may not yet know of the primary's timeline in the place where pg_rewind looks for it.
        if await self._asked(state.primary) is not False:
            raise DatabaseError(f"the primary {state.primary.addr} does not answer as such, so nothing is taken back")
        self._detail = "rewinding"
        try:
            await self._directory.rewind(self._workplace.source(state.primary, COPYING))
        except DatabaseError as error:
            log.warning("rewinding failed", extra={"error": error})
            if await self._asked(state.primary) is not False:
                raise  # it died meanwhile: the next one is rewound from, which takes seconds, and a copy hours
            await self._copy(upstream)
        finally:
            self._detail = ""

    async def _copy(self, upstream: Instance) -> None:
        if await self._asked(upstream) is None:
            raise DatabaseError(f"the upstream {upstream.addr} does not answer, so there is nothing to copy")
        self._detail = "copying the upstream"
        try:
            await self._directory.copy(self._workplace.source(upstream, COPYING))
        finally:
            self._detail = ""

    async def _asked(self, other: Instance | None) -> bool | None:
        """Whether another server is a standby; None if it does not answer within a moment.

        A primary writes a checkpoint: only then its present timeline is in the place where pg_rewind looks for it.
        """
        assert other is not None  # a state without a primary is not parsed
        try:
            # The lock is held: a server that hangs over there must not keep this one from taking over. A checkpoint
            # that takes longer goes on without us, so that the next try finds it done.
            async with (
                asyncio.timeout(ASK_LIMIT.total_seconds()),
                await AsyncConnection.connect(
                    self._workplace.source(other, COPYING), password=self._config.password, autocommit=True
                ) as connection,
            ):
                row = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchone()
                assert row is not None
                if not row[0]:
                    await connection.execute("CHECKPOINT")
                return bool(row[0])
        except (psycopg.Error, OSError, TimeoutError) as error:
            log.info("another server does not answer", extra={"server": other.addr, "error": error or "too slow"})
            return None

    # --- holding

    async def _hold_primary(self) -> Held:
        mode = replace(self._mode, sync=NOBODY, read_only=True, replicated=True)
        if self._mode.sync:
            self._configure(mode)
        else:
            # From "wait for nobody" to "wait": only a new server is sure to know in all of its processes.
            await self._restart(mode)
        confirmed, position = 0, ""
        while confirmed < 2:
            async with self._local_connection() as connection:
                silent, position = await queries.waits_for_nobody_real(connection)
            confirmed = confirmed + 1 if silent else 0
            await asyncio.sleep(queries.POLL.total_seconds())
        return Held(received=position, usable=position)

    async def _hold_standby(self) -> Held:
        self._configure(replace(self._mode, upstream=None))
        async with self._local_connection() as connection:
            received, replayed = await queries.at_rest(connection)
        return Held(received=wal.later(received, replayed), usable=replayed)

    # --- replication in step

    async def _check_downstream(self, downstream: Instance) -> None:
        """Note that the downstream has all there was when the question came up."""
        async with self._local_connection() as connection:
            self._target = self._target or await queries.end_of_log(connection)
            if not self._target or not await queries.has_reached(
                connection, self._identity_of(downstream), self._target, as_sync=not self._mode.standby
            ):
                return
        self._synced = downstream
        log.info("the downstream has caught up", extra={"downstream": downstream.addr, "position": self._target})

    async def _is_streaming(self) -> bool:
        upstream = self._mode.upstream
        answer = await self._answer()
        return upstream is not None and answer.sender == (upstream.host, upstream.port)

    # --- the steps

    async def _start(self, mode: Mode) -> None:
        """Start the server and wait until it lets clients in."""
        await self._launch(mode)
        await self._until_ready(START_LIMIT, heed_news=False)

    async def _launch(self, mode: Mode) -> None:
        config, data = self._config, self._directory.path
        self._workplace.prepare()
        try:
            self._mode = mode
            self._workplace.admit(data)
            self._workplace.configure(data, mode)
            self._postmaster = await Postmaster.start(config.installation, data)
        except OSError as error:
            raise DatabaseError(f"cannot start the server: {error}") from error

    async def _until_ready(self, limit: timedelta, *, heed_news: bool) -> None:
        """Wait for the server that was launched. Raises NotReadyInTime, EndedDuringStart, or DatabaseError for news."""
        try:
            async with asyncio.timeout(limit.total_seconds()):
                while not await self._lets_in():
                    if heed_news and self._news != self._heard:
                        raise DatabaseError("the server is starting, and there are news about the cluster")
                    await asyncio.sleep(START_POLL.total_seconds())
        except TimeoutError as error:
            await self._stop()
            raise NotReadyInTime(f"the server was not ready after {limit}") from error

    async def _lets_in(self) -> bool:
        """Whether the server that was launched takes connections. Raises EndedDuringStart."""
        try:
            async with self._local_connection() as connection:
                await connection.execute("SELECT 1")
        except (psycopg.Error, OSError) as error:
            if not self._running:
                raise EndedDuringStart("the server ended during its start, its log tells why") from error
            return False
        return True

    async def _restart(self, mode: Mode) -> None:
        await self._stop()
        await self._start(mode)
        self._became_ready.set()

    def _configure(self, mode: Mode) -> None:
        """Let the running server read its configuration anew, if it is another one."""
        assert self._postmaster is not None  # the caller checked
        try:
            if mode != self._mode:
                self._mode = mode
                self._workplace.configure(self._directory.path, mode)
                self._postmaster.reload()
        except OSError as error:
            raise DatabaseError(f"cannot configure the server: {error}") from error

    async def _promote(self) -> None:
        try:
            async with self._local_connection() as connection:
                # The configuration that names the sync has to be known before the first write is possible.
                await queries.works_by(connection, self._mode.sync)
                promoted = await queries.promote(connection)
        except (psycopg.Error, OSError) as error:
            raise DatabaseError(f"cannot promote the server: {error}") from error
        if not promoted:
            raise DatabaseError(f"the server was not promoted within {queries.PROMOTE_SECONDS} s")
        log.info("promoted")

    async def _stop(self) -> None:
        postmaster, self._postmaster = self._postmaster, None
        self._became_ready.clear()
        await self._stop_asking()
        if postmaster is not None:
            await postmaster.stop()
            log.info("the server has stopped")

    async def _ensure_superuser(self) -> None:
        try:
            async with self._local_connection() as connection:
                await queries.ensure_superuser(connection, self._config.password)
        except psycopg.Error as error:
            raise DatabaseError(f"cannot make the superuser: {error}") from error

    # --- questions

    @asynccontextmanager
    async def _local_connection(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            yield connection
        finally:
            await connection.close()

    async def _connect(self) -> Connection:
        return await queries.connect(self._config.run, self._config.port)

    async def _answer(self) -> Answer:
        """What the server says of itself. Raises psycopg.Error, OSError or TimeoutError."""
        async with asyncio.timeout(INFO_LIMIT.total_seconds()) as limit, self._probing:
            if not self._running:
                raise ConnectionError("the server is being stopped")
            self._asking = limit
            try:
                return await self._ask()
            finally:
                self._asking = None

    async def _stop_asking(self) -> None:
        """Close the probe's connection; who waits for an answer gets none.

        Never under him: the next to open a file may get the descriptor that he is still waiting on.
        """
        if self._asking is not None and not self._asking.expired():
            self._asking.reschedule(asyncio.get_running_loop().time())
        async with self._probing:
            await self._close_probe()

    async def _ask(self) -> Answer:
        if self._probe is None or self._probe.closed:
            self._probe = await self._connect()
        try:
            return await queries.ask(self._probe)
        except BaseException:
            await self._close_probe()
            raise

    async def _close_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            await probe.close()


def _address(instance: Instance | None) -> tuple[str, str] | None:
    return None if instance is None else (instance.id, instance.addr)


def _generation(config: DatabaseConfig) -> int:
    return config.state.generation if config.state is not None else 0
