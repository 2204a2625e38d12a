"""Histories full of faults: nobody acknowledges twice, nothing acknowledged is lost, and in the end all is whole."""

import os

import pytest

from tests.appliances.sirenia.simulation import SafetyViolated, World, run_virtually, simulate

SEEDS = int(os.environ.get("SIRENIA_SEEDS", "15"))


def run(seed: int, peers: int) -> World:
    try:
        return run_virtually(simulate(seed, peers))
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
