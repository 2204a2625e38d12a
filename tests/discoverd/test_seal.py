"""Messages between members: without the key nobody reads or writes them, or makes anybody run code."""

from __future__ import annotations

import pickle
import socket
import struct
import zlib
from pathlib import Path

import pytest

from flynn.discoverd.membership import raft_address
from flynn.discoverd.raft import seal
from flynn.discoverd.raft.seal import NotSealed, Seal
from tests.discoverd.harness import Place, member, until


def test_who_has_the_key_can_read_it() -> None:
    one, other = Seal("the key"), Seal("the key")
    sealed = one.encrypt_at_time(b"hello", 1234)
    assert (other.decrypt(sealed), other.extract_timestamp(sealed)) == (b"hello", 1234)
    assert b"hello" not in sealed
    assert one.encrypt_at_time(b"hello", 1234) != sealed, "no two messages are alike"


def test_whoever_has_not_cannot_and_changes_show() -> None:
    sealed = Seal("the key").encrypt_at_time(b"hello", 1234)
    with pytest.raises(NotSealed):
        Seal("a guess").decrypt(sealed)
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(NotSealed):
            Seal("the key").decrypt(bytes(changed))
    for length in range(len(sealed)):
        with pytest.raises(NotSealed):
            Seal("the key").decrypt(sealed[:length])


def test_senders_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "MAX_SENDERS", 3)
    receiver = Seal("the key")
    for number in range(6):
        assert receiver.decrypt(Seal("the key").encrypt_at_time(b"%d" % number, 0)) == b"%d" % number
        assert len(receiver._senders) <= 3


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


async def test_a_stranger_cannot_have_a_member_run_code(place: Place, tmp_path: Path) -> None:
    proof = tmp_path / "was here"
    async with member(place) as live:
        host, port = raft_address(place.http_address).rsplit(":", 1)
        for sealed in (lambda data: data, lambda data: Seal("a guess").encrypt_at_time(data, 1)):
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                data = sealed(zlib.compress(pickle.dumps(Attack(proof))))
                stranger.sendall(struct.pack("i", len(data)) + data)
                stranger.settimeout(5)
                assert stranger.recv(10) == b"", "it hangs up"
        assert not proof.exists()
        before = live.state.index
        async with place.client() as client:
            await client.create("still-there")
        await until(lambda: live.state.index > before)
