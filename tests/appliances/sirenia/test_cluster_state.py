"""The cluster state document as others read it."""

import json
from datetime import UTC, datetime

import pytest

from flynn.appliances.sirenia.cluster_state import BadClusterState, ClusterState, Freeze, parse_state
from flynn.types.codec import encode
from flynn.types.instance import Instance

N1 = Instance(id="i1", addr="10.0.0.1:5432", proto="tcp", meta={"POSTGRES_ID": "p1"})


def test_a_singleton_as_written() -> None:
    freeze = Freeze(frozen_at=datetime(2026, 1, 2, tzinfo=UTC), reason="because")
    state = ClusterState(generation=1, singleton=True, freeze=freeze, init_wal="0/00000000", primary=N1)
    assert json.loads(encode(state)) == {
        "generation": 1,
        "freeze": {"frozen_at": "2026-01-02T00:00:00Z", "reason": "because"},
        "singleton": True,
        "init_wal": "0/00000000",
        "primary": {"id": "i1", "addr": "10.0.0.1:5432", "proto": "tcp", "meta": {"POSTGRES_ID": "p1"}},
        "sync": None,
        "async": None,
    }


def test_a_replicated_cluster_is_read_with_its_async_peers_and_unknown_keys_are_ignored() -> None:
    peer = {"id": "i1", "addr": "10.0.0.1:5432", "proto": "tcp"}
    state = parse_state(
        {
            "generation": 3,
            "init_wal": "0/1",
            "primary": peer,
            "sync": peer,
            "async": [peer],
            "deposed": [peer],
            "new": 1,
        }
    )
    assert (state.generation, len(state.asyncs or []), len(state.deposed), state.singleton) == (3, 1, 1, False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(None, id="null"),
        pytest.param({}, id="empty"),
        pytest.param({"generation": "one"}, id="wrong type"),
        pytest.param({"generation": 1, "primary": None}, id="no primary"),
    ],
)
def test_what_is_not_a_state_is_refused(data: object) -> None:
    with pytest.raises(BadClusterState):
        parse_state(data)
