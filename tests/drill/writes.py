"""The witness inside: on every node a client of the app's database writes numbers and remembers which were confirmed.

It finds the database as an app does: by `leader.postgres.discoverd`, asked of the node's own name server, over the
overlay, with the app's credentials. A number is used once: when it is not known whether a write took effect, it is not
repeated, and not counted on.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psycopg
from dnslib import DNSRecord
from psycopg import pq

from tests.cluster.lab import reach
from tests.cluster.lab.layout import Node

PER_SECOND = 5  # on each node
WRITE_SECONDS = 5.0  # after that the connection is given up, as a patient app would do
CONNECT_SECONDS = 3
AGAIN_SECONDS = 0.25
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The database, or the way to it, did not do what was asked; says why."""


class WriteWitness:
    """Writes from `start` to `stop`. Nodes in `dark` are left alone, and their clients start anew afterwards."""

    def __init__(self, members: Sequence[Node], credentials: Mapping[str, str]) -> None:
        self.dark: frozenset[Node] = frozenset()
        self._members = tuple(members)
        self._credentials = dict(credentials)
        self._confirmed: dict[Node, list[tuple[int, float]]] = {member: [] for member in members}
        self._reason: dict[Node, str] = dict.fromkeys(members, "has not written yet")
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(member,), name=f"writes {member.id}", daemon=True)
            for member in members
        ]

    def start(self) -> None:
        """Make the table, then write. Raises Refused."""
        for statement in (
            "DROP TABLE IF EXISTS drill",
            "CREATE TABLE drill (writer text, n bigint, PRIMARY KEY (writer, n))",
        ):
            self._once(self._members[0], statement)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(WRITE_SECONDS + CONNECT_SECONDS + 5)

    def failing(self, since: float) -> str:
        """Where no write has been confirmed since then, and why; nothing if some have been everywhere."""
        for member in self._members:
            if member in self.dark:
                continue
            confirmed = self._confirmed[member]
            if not confirmed or confirmed[-1][1] < since:
                return f"the database, from {member.id}: {self._reason[member] or 'no answer'}"
        return ""

    def confirmed(self, since: float = 0) -> int:
        return sum(at >= since for written in self._confirmed.values() for _, at in written)

    def longest_pause(self, since: float, until: float) -> float:
        """The longest time in which nobody's write was confirmed."""
        moments = sorted(at for written in self._confirmed.values() for _, at in written if since <= at <= until)
        return max(after - before for before, after in zip([since, *moments], [*moments, until], strict=True))

    def lost(self, seconds: float = 60) -> int:
        """How many confirmed writes are not in the database. Raises Refused if it cannot be asked for so long."""
        deadline = time.monotonic() + seconds
        while True:
            counted = {member: [n for n, _ in self._confirmed[member]] for member in self._members}
            lit = [member for member in self._members if member not in self.dark]
            try:
                rows = self._once(lit[0], "SELECT writer, n FROM drill")
                break
            except Refused:
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_SECONDS)
        present = {(writer, int(n)) for writer, n in rows}
        return sum((member.id, n) not in present for member, numbers in counted.items() for n in numbers)

    def _once(self, member: Node, statement: str) -> list[tuple[str, ...]]:
        """One statement on a connection of its own, by a thread of its own."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: Client(member, self._credentials).run(statement)).result()

    def _write(self, member: Node) -> None:
        client: Client | None = None
        number = 0
        while not self._ending.wait(1 / PER_SECOND):
            if member in self.dark:
                client = None
                continue
            try:
                client = client or Client(member, self._credentials)
                number += 1
                client.run("INSERT INTO drill VALUES ($1, $2)", member.id, str(number))
            except Refused as error:
                client, self._reason[member] = None, str(error)
                self._ending.wait(AGAIN_SECONDS)
            else:
                self._confirmed[member].append((number, time.monotonic()))
                self._reason[member] = ""


class Client:
    """One connection to the database, from a node. For the thread that makes it, which is in the node's network then.

    Not one of psycopg's cursors, because a write has to have an end here whatever the server does.
    """

    def __init__(self, member: Node, credentials: Mapping[str, str]) -> None:
        try:
            enter_network(member)
            address = look_up(member, credentials["PGHOST"])
            self._connection = psycopg.Connection.connect(
                host=credentials["PGHOST"], hostaddr=address, user=credentials["PGUSER"],
                password=credentials["PGPASSWORD"], dbname=credentials["PGDATABASE"], connect_timeout=CONNECT_SECONDS,
                sslmode="prefer", autocommit=True, application_name="drill",
            )  # fmt: skip
        except (OSError, psycopg.Error) as error:
            raise Refused(" ".join(str(error).split())) from error

    def run(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        """One statement; its rows as text. Raises Refused, and the connection is closed then."""
        server = self._connection.pgconn
        try:
            server.send_query_params(statement.encode(), [value.encode() for value in values])
            return self._rows(server)
        except (OSError, psycopg.Error, Refused) as error:
            server.finish()
            raise Refused(" ".join(str(error).split())) from error

    @staticmethod
    def _rows(server: pq.abc.PGconn) -> list[tuple[str, ...]]:
        deadline = time.monotonic() + WRITE_SECONDS
        while server.flush():
            if not select.select([], [server.socket], [], max(0, deadline - time.monotonic()))[1]:
                raise Refused(f"nothing could be sent for {WRITE_SECONDS:.0f} s")
        rows: list[tuple[str, ...]] = []
        while True:
            while server.is_busy():
                if not select.select([server.socket], [], [], max(0, deadline - time.monotonic()))[0]:
                    raise Refused(f"not confirmed within {WRITE_SECONDS:.0f} s")
                server.consume_input()
            result = server.get_result()
            if result is None:
                return rows
            if result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
                raise Refused(result.error_message.decode("utf-8", "replace"))
            for row in range(result.ntuples):
                values = (result.get_value(row, column) for column in range(result.nfields))
                rows.append(tuple((value or b"").decode() for value in values))


def enter_network(member: Node) -> None:
    """Put the calling thread into the network of a node, as it is now: a node that was off has a new one."""
    descriptor = os.open(f"/run/netns/{member.namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"enter the network of {member.id}")
    finally:
        os.close(descriptor)


_name_servers: dict[Node, str] = {}


def look_up(member: Node, name: str) -> str:
    """The address of a name, from the node's name server, asked in the node's network. Raises OSError."""
    if member not in _name_servers:
        try:
            status = reach.ask(member, reach.HOST_API, "/host/status").json()
        except reach.NoAnswer as error:
            raise OSError(f"where is the name server of {member.id}? {error}") from error
        address = (status.get("discoverd") or {}).get("dns", "") if isinstance(status, dict) else ""
        if not address:
            raise OSError(f"{member.id} has no name server yet")
        _name_servers[member] = address.rpartition(":")[0]
    try:
        reply = DNSRecord.parse(DNSRecord.question(name).send(_name_servers[member], timeout=2))
    except OSError as error:
        _name_servers.pop(member, None)  # a node that was replaced may have got another subnet
        raise OSError(f"the name server of {member.id}: {error}") from error
    addresses = [str(answer.rdata) for answer in reply.rr if answer.rtype == 1]
    if not addresses:
        raise OSError(f"{name} has no address")
    return addresses[0]
