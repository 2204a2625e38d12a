"""A member of a Raft cluster driven by hand: nothing is ticked, nothing is timed, what is sent is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pysyncobj.node import TCPNode

from flynn.discoverd.raft.node import RaftConfig, _Member
from tests.discoverd.harness import loopback_address

NO_OP = b"\x01"
ADD_MEMBER = b"\x02"


class Machine:
    def apply(self, index: int, command: bytes) -> object:
        return None

    def dump(self) -> bytes:
        return b""

    def restore(self, index: int, state: bytes) -> None:
        pass


class Follower:
    """A member that follows, or an observer."""

    def __init__(self, directory: Path, *, observing: bool = False) -> None:
        self.leaders = [TCPNode(f"{loopback_address()}:1110") for _ in range(2)]
        own = f"{loopback_address()}:1110"
        members = [*self.leaders, *([] if observing else [TCPNode(own)])]
        config = RaftConfig(
            address=own,
            peers=[node.address for node in members],
            directory=directory,
            password="secret of the test",
        )
        self.member = _Member(config, Machine(), lambda old, new: None)
        self.sent: list[dict[str, Any]] = []
        self.transport = self.member._SyncObj__transport
        self.transport.send = lambda node, message: self.sent.append(message)

    def told(self, term: int, after: tuple[int, int], entries: list[tuple[int, int]], commit: int) -> dict[str, Any]:
        """A message of the leader of `term`: its entries (index, term) behind `after`; the answer."""
        self.transport._onMessageReceived(
            self.leaders[term % 2],
            {
                "type": "append_entries", "term": term, "commit_index": commit, "prevLogIdx": after[0],
                "prevLogTerm": after[1], "entries": [(command(*entry), *entry) for entry in entries],
            },
        )  # fmt: skip
        return self.sent.pop()

    @property
    def log(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self.member.journal[1:]]

    @property
    def committed(self) -> int:
        return int(self.member.raftCommitIndex)


def command(index: int, term: int) -> bytes:
    return NO_OP + f"{index} of term {term}".encode()
