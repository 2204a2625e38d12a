"""One member of the Raft cluster: a thread that ticks pysyncobj, and a way to submit commands from asyncio.

What differs from pysyncobj as it comes, and why:

- Pace. By itself it sends and commits only every `appendEntriesPeriod`, so a lone writer waits 100 ms and more. Here
  the tick is repeated until neither the log nor the commit index moves, and only then does the thread wait for a
  socket, for a new command (a pipe wakes it) or for the next period. Idle it ticks a few times a second.
- Batches. What has come up in one tick, commands and what is committed, goes to a follower in one message; by itself
  it sends one per command and another per commit. Small messages are not compressed, see `compression`.
- Repetition. What a leader repeats is recognised, and nothing is committed that a message does not speak for; see
  `_Member.news_in`. A confirmation that comes late no longer moves a follower's position back, see `_Transport`.
- Elections. Whether one could be won is asked before it is called, see `prevote`.
- Durability. The journal is ours (`journal`). It is synced before the leader counts itself, and by `_Transport` before
  a follower confirms.
- Snapshots are our own format, and the journal is trimmed to the snapshot when both are loaded: pysyncobj would drop
  the entries behind a snapshot if the process died between writing one and shortening the log.
- Membership is kept in a file of its own. pysyncobj learns of a change only when it applies the log again, so a member
  that restarts would begin with the cluster of its configuration: one that was once alone would elect itself.
- A node that is no member takes part as an observer: it is sent the log like a follower, but neither votes nor counts.
  Its journal is that of a follower, so that it can become a member, and cease to be one, with what it has.
- Always with a password: its wire carries pickles, which from a stranger would be code.

The state machine runs in this thread; results and news go to the event loop with `call_soon_threadsafe`, in order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pysyncobj.syncobj
import pysyncobj.tcp_connection
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, SyncObjException, replicated
from pysyncobj.journal import MemoryJournal
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

from flynn.discoverd.raft import compression, prevote
from flynn.discoverd.raft.journal import DurableJournal, write_durably
from flynn.discoverd.raft.prevote import Canvass, Position
from flynn.discoverd.raft.seal import Seal
from flynn.discoverd.raft.snapshot import Snapshot
from flynn.types.errors import ServiceUnavailable

log = logging.getLogger(__name__)

PERIOD = 0.1  # seconds between the leader's heartbeats when there is nothing to send
ELECTION_TIMEOUT = (0.35, 0.75)  # a dead leader is replaced within 1.5 s, counting one split vote
ALONE_PERIOD = 0.02  # a cluster of one has nobody to send to or to wait for, so it is back at once;
ALONE_ELECTION_TIMEOUT = (0.07, 0.1)  # pysyncobj wants three periods at least
LEASE = 1.5  # a leader that has not heard from a majority for so long steps down
WAIT = 0.05  # how late a deadline may be noticed
WAIT_BEFORE_ELECTION = 0.01
WAIT_ALONE = 0.25  # leading a cluster of one there are no deadlines
HAND_OVER_SECONDS = 0.5  # for the election that was asked for; a second request would call another one
COMMIT_LIMIT = 5.0  # seconds until a write without an outcome is reported as unavailable
SNAPSHOT_ENTRIES = 8192
JOINING_LIMIT = 120.0
MEMBERS = "members.json"

_BARRIER = b""


class StateMachine(Protocol):
    """Called in the node's thread only."""

    def apply(self, index: int, command: bytes) -> object:
        """Apply a committed command; must not raise. The result goes to whoever submitted it here."""

    def dump(self) -> bytes: ...

    def restore(self, index: int, state: bytes) -> None:
        """Become what `dump` gave elsewhere or earlier."""


class NotReplicated(ServiceUnavailable):
    """The command has not been committed here, as far as this member knows: no leader, no majority, or no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftConfig:
    address: str  # own `ip:port` of the Raft port, which is also this member's name
    peers: Sequence[str]  # members at the very first start; a node that is not among them observes
    directory: Path
    password: str
    joining: bool = False  # a member that the others have yet to be told of: it must not call elections before


class RaftNode:
    """Made by `running`; everything here may be used from the event loop."""

    def __init__(self, config: RaftConfig, machine: StateMachine, loop: asyncio.AbstractEventLoop) -> None:
        self.address = config.address
        self._loop = loop
        self._machine = machine
        self._on_leadership: Callable[[bool], None] = lambda _: None
        self._stopping = threading.Event()
        self._calls: deque[Callable[[], None]] = deque()  # for the thread, which alone may speak to the others
        self._member = _Member(config, machine, self._state_changed)
        self._thread = threading.Thread(target=self._tick_until_stopped, name="raft", daemon=True)

    def start(self, on_leadership: Callable[[bool], None]) -> None:
        """`on_leadership` is called in the event loop whenever this member becomes leader or ceases to be it."""
        self._on_leadership = on_leadership
        self._thread.start()

    async def submit(self, command: bytes) -> Any:
        """Commit a command and return what the state machine made of it.

        Raises:
            NotReplicated: it may or may not take effect later.
        """
        outcome: asyncio.Future[Any] = self._loop.create_future()

        def done(result: object, reason: int) -> None:
            self._post(_settle, outcome, result, reason)

        self._member.command(command, callback=done)
        try:
            return await asyncio.wait_for(outcome, COMMIT_LIMIT)
        except TimeoutError:
            raise NotReplicated("the write was not confirmed by a majority in time") from None

    async def barrier(self) -> None:
        """Returns when everything that was committed before has been applied here."""
        await self.submit(_BARRIER)

    @property
    def index(self) -> int:
        return int(self._member.raftLastApplied)

    @property
    def is_leader(self) -> bool:
        return bool(self._member._isLeader())

    @property
    def leader(self) -> str | None:
        """The Raft address of the leader as far as this member knows."""
        leader = self._member._getLeader()
        return None if leader is None else str(leader.address)

    @property
    def is_member(self) -> bool:
        """Whether this node votes; else it observes."""
        return not self._member.observing

    @property
    def members(self) -> list[str]:
        return sorted(self._member.members)

    @property
    def silence(self) -> float:
        """Seconds since this node last heard from a leader or, leading, from a majority: how stale its state may be."""
        return 0.0 if self.is_leader else time.monotonic() - self._member.heard

    def joined(self) -> None:
        """The other members know of this one now, which joined them."""
        self._member.take_part()

    async def hand_over(self, within: float) -> None:
        """Have the follower that is furthest lead in our place. Raises NotReplicated if none does in time (seconds)."""
        try:
            async with asyncio.timeout(within):
                while self.is_leader:
                    # Refused as long as that follower lacks an entry, which under load it does most of the time.
                    patience = HAND_OVER_SECONDS if await self._asked_to_lead() else 0.005
                    asked = self._loop.time()
                    while self.is_leader and self._loop.time() < asked + patience:
                        await asyncio.sleep(0.005)
        except TimeoutError:
            raise NotReplicated("no other member took over the lead") from None

    async def _asked_to_lead(self) -> bool:
        outcome: asyncio.Future[Any] = self._loop.create_future()

        def ask() -> None:
            self._member.transferLeadership(
                callback=lambda result, reason: self._post(_settle, outcome, result, reason)
            )

        self._calls.append(ask)
        try:
            await outcome
        except NotReplicated:
            return False
        return True

    async def add_member(self, address: str) -> None:
        await self._change_members(self._member.addNodeToCluster, address)

    async def remove_member(self, address: str) -> None:
        await self._change_members(self._member.removeNodeFromCluster, address)

    async def stop(self) -> None:
        self._stopping.set()
        self._member.command(_BARRIER)  # wakes the thread
        await asyncio.to_thread(self._thread.join)

    async def _change_members(self, change: Callable[..., None], address: str) -> None:
        outcome: asyncio.Future[Any] = self._loop.create_future()
        change(TCPNode(address), callback=lambda result, reason: self._post(_settle, outcome, result, reason))
        try:
            await asyncio.wait_for(outcome, COMMIT_LIMIT)
        except TimeoutError:
            raise NotReplicated("the change of membership was not confirmed in time") from None

    def _tick_until_stopped(self) -> None:
        member = self._member
        try:
            while not self._stopping.is_set():
                while self._calls:
                    self._calls.popleft()()
                before = member.position
                member.doTick(0.0)
                member.persist()
                if member.position == before:
                    member.doTick(member.patience)
                    member.persist()
        except BaseException:
            # Without its log a member must not go on: the process ends and starts again from what is on disk.
            log.critical("the Raft thread failed", exc_info=True)
            self._post(_fail_loop)
        finally:
            member._doDestroy()

    def _state_changed(self, old: int, new: int) -> None:
        is_leader = new == _LEADER
        if is_leader or old == _LEADER:
            self._post(self._on_leadership, is_leader)

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return  # The loop is closed already: nobody is left to be told.


@asynccontextmanager
async def running(
    config: RaftConfig, machine: StateMachine, on_leadership: Callable[[bool], None]
) -> AsyncIterator[RaftNode]:
    """Open the log and take part in the cluster while the block is open. Raises OSError if the port is taken."""
    config.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    node = await asyncio.to_thread(RaftNode, config, machine, asyncio.get_running_loop())
    node.start(on_leadership)
    try:
        yield node
    finally:
        await node.stop()


_LEADER = pysyncobj.syncobj._RAFT_STATE.LEADER


def _create_journal(path: str | None) -> object:
    return MemoryJournal() if path is None else DurableJournal(Path(path))


# The constructor of SyncObj makes its journal itself and reads term and log from it: no other way to give it ours.
pysyncobj.syncobj.createJournal = _create_journal
pysyncobj.tcp_connection.zlib = compression
pysyncobj.syncobj.getEncryptor = Seal
# Its own clock is another one than everybody's (CLOCK_MONOTONIC_RAW), and drifts away from the deadlines set here.
pysyncobj.syncobj.monotonicTime = time.monotonic
# Nodes are keys of everything it looks at, many times in each tick; by themselves they compare by way of an abc.
TCPNode.__hash__ = lambda self: hash(self._id)
TCPNode.__eq__ = lambda self, other: self is other or (type(other) is TCPNode and self._id == other._id)


class _Member(SyncObj):  # type: ignore[misc]  # the library has no types
    def __init__(self, config: RaftConfig, machine: StateMachine, on_state: Callable[[int, int], None]) -> None:
        self._machine = machine
        self._members_file = config.directory / MEMBERS
        self._members_known = _read_members(self._members_file)
        members = {*(self._members_known or config.peers), *([config.address] if config.joining else ())}
        self.observing = config.address not in members
        self._joining = config.joining
        self._others_known: set[Any] | None = None  # as far as the file of members is concerned
        self.keep_tail = False
        self._sending_due = False
        self.heard = time.monotonic()
        self.canvass = Canvass()
        others = [peer for peer in members if peer != config.address]
        conf = SyncObjConf(
            password=config.password,
            autoTick=False,
            appendEntriesUseBatch=False,  # send in the same tick, and wake the thread by a pipe
            **_pace(alone=not others),
            leaderFallbackTimeout=LEASE,
            connectionRetryTime=0.5,
            commandsWaitLeader=False,
            dynamicMembershipChange=True,
            bindAddress=config.address,  # by itself it would listen on every address of the machine
            maxBindRetries=1,
            journalFile=str(config.directory / "raft.log"),
            fullDumpFile=str(config.directory / "snapshot"),
            serializer=self._write_snapshot,
            deserializer=self._read_snapshot,
            logCompactionMinEntries=SNAPSHOT_ENTRIES,
            onStateChanged=on_state,
        )
        try:
            super().__init__(None if self.observing else config.address, others, conf, transportClass=_Transport)
        except SyncObjException as error:
            raise OSError(f"cannot listen on {config.address} for Raft") from error
        if config.joining:
            self._election_not_before(JOINING_LIMIT)
        if self.observing:
            # It may have called elections in vain, as a member that the others had removed. Observers do not vote, so
            # nobody would ever hear of its high term, and it would be deaf to a leader with a lower one. The ballot on
            # the disk stays as it is, for the day it is a member again.
            self._SyncObj__raftCurrentTerm = self._SyncObj__getCurrentLogTerm()

    @property
    def journal(self) -> DurableJournal:
        journal: DurableJournal = self._SyncObj__raftLog
        return journal

    @property
    def members(self) -> frozenset[str]:
        others = frozenset(node.address for node in self.otherNodes)
        return others if self.observing else others | {self.selfNode.address}

    def take_part(self) -> None:
        self._joining = False
        self._election_not_before(ELECTION_TIMEOUT[1])

    def _election_not_before(self, seconds: float) -> None:
        self._SyncObj__raftElectionDeadline = time.monotonic() + seconds

    def persist(self) -> None:
        """Put on disk what happened since the last call, membership first: too many members are safe, too few not."""
        others = self._SyncObj__otherNodes
        if others != self._others_known and not self._joining:
            self._others_known = set(others)
            self._keep_members(self.members)
        self.journal.sync()

    def _keep_members(self, members: frozenset[str]) -> None:
        if members != self._members_known:
            write_members(self._members_file.parent, members)
            self._members_known = members
            for name, seconds in _pace(alone=len(members) == 1).items():
                setattr(self.conf, name, seconds)  # it is looked at each time

    @property
    def patience(self) -> float:
        """How long the thread may wait for something to happen."""
        if self.otherNodes:
            return WAIT
        return WAIT_ALONE if self._isLeader() else WAIT_BEFORE_ELECTION

    def hear(self, term: int) -> None:
        """A leader has spoken: one of the past is not listened to, and does not make us less blind."""
        if term >= self.raftCurrentTerm:
            self.heard = time.monotonic()
            self.canvass.end()
        else:
            self.canvass.approved = True  # the others follow it and agree to nobody: only a vote makes it our equal

    @property
    def _end_of_log(self) -> Position:
        _, index, term = self.journal[-1]
        return term, index

    def _onTick(self, timeToWait: float = 0.0) -> None:
        self._ask_before_election()
        super()._onTick(timeToWait)

    def _ask_before_election(self) -> None:
        """Put off an election that is due until a majority agrees to it."""
        due = self._SyncObj__raftElectionDeadline < time.monotonic()
        if not due or self.observing or self._isLeader() or not self.otherNodes:
            return
        if self.canvass.approved or self._SyncObj__transferInProgress:
            self.canvass.end()  # the library calls the election now
            return
        self._election_not_before(prevote.patience())
        if self._SyncObj__raftLeader is not None:  # type: ignore[has-type]
            self._SyncObj__raftLeader = None
            self._SyncObj__onLeaderChanged()  # who waits for his answer waits in vain
        question = {"type": "pre_vote", "round": self.canvass.begin(), "log": self._end_of_log}
        for other in self.otherNodes:
            self._SyncObj__transport.send(other, question)

    def asked_for_a_vote(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to somebody who may want to lead; None = no."""
        silence, log = time.monotonic() - self.heard, tuple(question["log"])
        if self.observing or not prevote.agrees(
            leads=self._isLeader(), silence=silence, own=self._end_of_log, other=log
        ):
            return None
        self._election_not_before(ELECTION_TIMEOUT[0])  # it goes first: two at once would share the votes
        return {"type": "pre_vote_agreed", "round": question["round"], "term": self.raftCurrentTerm}

    def agreed(self, other: Any, answer: dict[str, Any]) -> None:
        if self._isLeader() or other not in self.otherNodes:
            return
        if answer["term"] > self.raftCurrentTerm:
            self._SyncObj__setCurrentTerm(answer["term"], None)  # with less the real vote would be refused
        if self.canvass.hear(other, answer["round"], len(self.members)):
            self._election_not_before(0)

    def news_in(self, message: dict[str, Any]) -> dict[str, Any]:
        """A leader's message without the entries that we have, and with no more committed than it speaks for.

        The part of our log behind the message may be news that overtook it, or left over from a leader that is gone:
        only a different entry in its place decides that. So it stays (`keep_tail`), and it is not committed either, for
        the leader's commit index speaks of the leader's log. Raft paper, figure 2, AppendEntries 3 to 5.
        """
        if "prevLogIdx" not in message:
            return message  # a part of a snapshot
        previous, term = message["prevLogIdx"], message["prevLogTerm"]
        if "transmission" in message:  # one large entry in pieces; the last of them completes it
            return {**message, "commit_index": min(message["commit_index"], previous + 1)}
        entries = list(message["entries"])
        last = previous + len(entries)
        if self.has(previous, term):
            while entries and self.has(previous + 1, entries[0][2]):
                (_, previous, term), *entries = entries
            self.keep_tail = not entries
        return {
            **message,
            "prevLogIdx": previous,
            "prevLogTerm": term,
            "entries": entries,
            "commit_index": min(message["commit_index"], last),
        }

    def has(self, index: int, term: int) -> bool:
        """Whether our log has the entry of that index and term; then it is the same entry."""
        position = index - self.journal[0][1]
        return 0 <= position < len(self.journal) and self.journal[position][2] == term

    def _SyncObj__getEntries(self, first: int, count: int | None = None, size: int | None = None) -> Any:
        """The library takes back, once it has found the entry before its news, all that this shows it behind."""
        return SyncObj._SyncObj__getEntries(self, first, 1 if self.keep_tail else count, size)

    def _SyncObj__sendAppendEntries(self) -> None:
        """Put off to the end of the tick, when all is known that there is to send."""
        self._sending_due = True

    def _checkCommandsToApply(self) -> None:
        super()._checkCommandsToApply()
        if self._sending_due:
            self._sending_due = False
            if self._isLeader():
                SyncObj._SyncObj__sendAppendEntries(self)

    @property
    def next_index(self) -> dict[Any, int]:
        """Per follower, the entry that it is sent next."""
        following: dict[Any, int] = self._SyncObj__raftNextIndex
        return following

    @property
    def position(self) -> tuple[int, int, int, int]:
        """Changes as long as there is something to do at once."""
        return self.journal[-1][1], self.raftCommitIndex, self.raftLastApplied, self.raftCurrentTerm

    @replicated  # type: ignore[untyped-decorator]
    def command(self, raw: bytes) -> object:
        if raw == _BARRIER:
            return None
        return self._machine.apply(self.raftLastApplied + 1, raw)

    def _write_snapshot(self, path: str, data: tuple[Any, ...]) -> None:
        last, before_last, nodes = data
        members = [node.address for node in nodes if node is not None]  # an observer has no node of its own
        Snapshot(self._machine.dump(), tuple(last), tuple(before_last), members).write(Path(path))

    def _read_snapshot(self, path: str) -> tuple[Any, ...]:
        snapshot = Snapshot.read(Path(path))
        covered = snapshot.before_last[1] - self.journal[0][1]
        if 0 < covered < len(self.journal) - 1 and self.journal[covered] == snapshot.before_last:
            self.journal.deleteEntriesTo(covered)
        self._machine.restore(snapshot.last[1], snapshot.state)
        return snapshot.last, snapshot.before_last, [TCPNode(address) for address in snapshot.members]


class _Transport(TCPTransport):  # type: ignore[misc]  # the library has no types
    def _onMessageReceived(self, node: Any, message: Any) -> None:
        """What the library makes of a message, except for three things.

        Pre-votes: it does not know of them.

        Entries: only those that are new to us are shown to it, see `_Member.news_in`; what it would make of the rest
        is to take back a part of the log that may already have been confirmed, changes of membership included.

        Confirmations: one that comes late must not move the leader's position for a follower back, or all that is
        under way would be sent and written again.
        """
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "pre_vote":
            if (answer := self._syncObj.asked_for_a_vote(message)) is not None:
                self.send(node, answer)
            return
        if kind == "pre_vote_agreed":
            self._syncObj.agreed(node, message)
            return
        if kind == "append_entries":
            self._syncObj.hear(message["term"])
            message = self._syncObj.news_in(message)
        following = self._syncObj.next_index.get(node, 0)
        super()._onMessageReceived(node, message)
        if kind == "append_entries":
            self._syncObj.keep_tail = False
        if kind == "next_node_idx" and not message["reset"]:
            now = self._syncObj.next_index
            if node in now:
                now[node] = max(now[node], following)

    def send(self, node: Any, message: Any) -> bool:
        if isinstance(message, dict) and message.get("type") == "next_node_idx":
            self._syncObj.journal.sync()  # "I have these entries" must be true after a power cut, too
        return bool(super().send(node, message))


def _pace(*, alone: bool) -> dict[str, float]:
    shortest, longest = ALONE_ELECTION_TIMEOUT if alone else ELECTION_TIMEOUT
    period = ALONE_PERIOD if alone else PERIOD
    return {"appendEntriesPeriod": period, "raftMinTimeout": shortest, "raftMaxTimeout": longest}


def write_members(directory: Path, members: Collection[str]) -> None:
    write_durably(directory / MEMBERS, msgspec.json.encode(sorted(members)))


def _read_members(path: Path) -> frozenset[str]:
    try:
        return frozenset(msgspec.json.decode(path.read_bytes(), type=list[str]))
    except FileNotFoundError:
        return frozenset()


def _settle(outcome: asyncio.Future[Any], result: object, reason: int) -> None:
    if outcome.done():
        return
    if reason == FAIL_REASON.SUCCESS:
        outcome.set_result(result)
    else:
        outcome.set_exception(NotReplicated(f"the write was not replicated ({_REASONS.get(reason, reason)})"))


def _fail_loop() -> None:
    raise SystemExit(1)


_REASONS = {value: name.lower().replace("_", " ") for name, value in vars(FAIL_REASON).items() if name.isupper()}
