"""What a peer decides in a cluster of one."""

from datetime import UTC, datetime

import pytest

from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze, Role
from flynn.appliances.sirenia.evaluate import SINGLETON_REASON, Cluster, Me, Misconfigured, evaluate
from flynn.types.codec import replace
from flynn.types.instance import Instance

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ZERO = "0/00000000"


def peer(number: int, *, at: int | None = None, index: int = 0) -> Instance:
    """Peer `number`, at the address of another number if it has moved."""
    addr = f"10.0.0.{at or number}:5432"
    return replace(Instance.at(addr, "tcp", {"ID": f"p{number}"}), index=index or number)


def as_written(instance: Instance) -> Instance:
    return replace(instance, index=0)


N1, N2 = peer(1), peer(2)
ME = Me(as_written(N1), "ID", singleton=True)
STATE = ClusterState(
    generation=1,
    singleton=True,
    freeze=Freeze(frozen_at=NOW, reason=SINGLETON_REASON),
    init_wal=ZERO,
    primary=as_written(N1),
)
OTHERS = replace(STATE, primary=as_written(N2))


@pytest.mark.parametrize(
    ("cluster", "role", "written"),
    [
        pytest.param(Cluster(), Role.UNKNOWN, None, id="before anybody is registered nothing happens"),
        pytest.param(Cluster(peers=(N1,)), Role.PRIMARY, STATE, id="alone: a new frozen singleton cluster"),
        pytest.param(Cluster(peers=(N1, N2)), Role.PRIMARY, STATE, id="the first of two sets up"),
        pytest.param(Cluster(peers=(N2, N1)), Role.UNASSIGNED, None, id="the second waits"),
        pytest.param(Cluster((N1,), N1, STATE), Role.PRIMARY, None, id="restart with nothing changed"),
        pytest.param(Cluster((N1, N2), N1, STATE), Role.PRIMARY, None, id="another peer changes nothing"),
        pytest.param(Cluster((), None, STATE), Role.PRIMARY, None, id="primary before its registration is seen"),
        pytest.param(Cluster((N1,), None, STATE), Role.PRIMARY, STATE, id="a service without leader gets one"),
        pytest.param(Cluster((N1, N2), N2, STATE), Role.PRIMARY, STATE, id="a wrong leader is put right"),
        pytest.param(
            Cluster((N1,), None, replace(STATE, primary=as_written(peer(1, at=7)))),
            Role.PRIMARY,
            STATE,
            id="primary at a new address: same generation, new record",
        ),
        pytest.param(Cluster((N1, N2), N2, OTHERS), Role.UNASSIGNED, None, id="second node of a singleton cluster"),
        pytest.param(Cluster((N1,), None, OTHERS), Role.UNASSIGNED, None, id="also when the primary is gone"),
        pytest.param(
            Cluster((N1,), None, replace(OTHERS, generation=2, deposed=[as_written(N1)])),
            Role.DEPOSED,
            None,
            id="deposed",
        ),
    ],
)
def test_decision(cluster: Cluster, role: Role, written: ClusterState | None) -> None:
    decision = evaluate(ME, cluster, ZERO, NOW)
    assert (decision.role, decision.write) == (role, written), decision.reason
    assert decision.reason


@pytest.mark.parametrize(
    ("me", "cluster"),
    [
        pytest.param(ME, Cluster((N1,), N1, replace(STATE, singleton=False)), id="singleton in a replicated cluster"),
    ],
)
def test_what_only_a_person_can_resolve(me: Me, cluster: Cluster) -> None:
    with pytest.raises(Misconfigured):
        evaluate(me, cluster, ZERO, NOW)
