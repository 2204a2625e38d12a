"""What the members' connections compress with: any zlib reads it, and it reads any zlib."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.discoverd.raft import compression


@given(st.binary(max_size=2 * compression.SMALL_BYTES))
def test_it_is_zlib_both_ways(data: bytes) -> None:
    assert zlib.decompress(compression.compress(data, 3)) == data
    assert compression.decompress(zlib.compress(data, 3)) == data


@pytest.mark.parametrize("size", [0, 1, compression.SMALL_BYTES, compression.SMALL_BYTES + 1, 1 << 17])
def test_small_messages_are_stored_and_large_ones_shrink(size: int) -> None:
    packed = len(compression.compress(bytes(size), 3))
    assert packed <= size * 1.05 + 11 if size <= compression.SMALL_BYTES else packed < size / 10
