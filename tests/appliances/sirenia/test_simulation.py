"""Histories full of faults: nobody acknowledges twice, nothing acknowledged is lost, and in the end all is whole.

That it can fail was tried: without `hold`, or without the comparison of positions, one seed in a dozen loses writes.
When takeovers replaced whatever state was there instead of the one they were decided upon, two of 200 did (with
neighbours taken for dead, ten). Such races are told one by one in test_races.
"""

import os

import pytest

from flynn.appliances.sirenia import suspicion
from tests.appliances.sirenia.simulation import SafetyViolated, World, run_virtually, simulate

SEEDS = int(os.environ.get("SIRENIA_SEEDS", "25"))


def run(seed: int, peers: int, paranoia: float = 0.0) -> World:
    try:
        return run_virtually(simulate(seed, peers, paranoia=paranoia))
    except BaseExceptionGroup as group:
        violations, rest = group.split(SafetyViolated)
        if rest is None and violations is not None:
            raise violations.exceptions[0] from None
        raise


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("peers", [3, 4])
def test_history(seed: int, peers: int) -> None:
    world = run(seed, peers)
    assert len(world.acknowledged) > 20


@pytest.mark.parametrize("seed", range(SEEDS))
def test_history_in_which_healthy_neighbours_are_taken_for_dead(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suspicion.PATIENCE, suspicion.Answer.DOWN, 0.2)
    world = run(seed, 3 + seed % 2, paranoia=0.7)
    assert len(world.acknowledged) > 20


def test_neighbours_taken_for_dead_are_taken_over_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the histories above would show nothing; in a short one it may not happen."""
    monkeypatch.setitem(suspicion.PATIENCE, suspicion.Answer.DOWN, 0.2)
    assert any(max(run(seed, 3, paranoia=0.7).ackers) > 1 for seed in range(3))
