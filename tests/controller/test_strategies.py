"""Strategies as walks: from counts to counts, never below what is wanted, resumable from anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.controller.deploy.garbage import releases_to_delete, slugs_to_keep
from flynn.controller.deploy.strategies import (
    Progress,
    ScaleNew,
    ScaleOld,
    Swap,
    UnsupportedStrategy,
    batch_size,
    failed_start_message,
    strategy_steps,
)
from flynn.types.artifact import Artifact
from flynn.types.errors import ValidationError
from flynn.types.release import Release


def walk(strategy: str, progress: Progress) -> tuple[list[str], list[Progress]]:
    """Follow a strategy to its end; the steps in words, and every state in between."""
    words, states = [], [progress]
    for _ in range(200):
        match strategy_steps(strategy)(progress):
            case None:
                return words, states
            case ScaleNew(processes):
                words += [f"new {name}={count}" for name, count in processes.items()]
                progress = replace(progress, new={**progress.new, **processes})
            case ScaleOld(processes, wait):
                words += [f"old {name}={count}{'' if wait else ' unwaited'}" for name, count in processes.items()]
                progress = replace(progress, old={**progress.old, **processes})
            case Swap(old, new):
                words.append(f"swap {old} for {new}".replace("'", ""))
                progress = replace(progress, old={**progress.old, **old}, new={**progress.new, **new})
        states.append(progress)
    raise AssertionError("the strategy does not end")


def start(counts: dict[str, int], types: tuple[str, ...], batch: int = 1) -> Progress:
    return Progress(wanted=counts, types=types, old=counts, new={}, batch=batch)


@pytest.mark.parametrize(
    ("strategy", "progress", "steps"),
    [
        pytest.param(
            "one-by-one",
            start({"web": 2, "worker": 1}, ("web",)),
            "new web=1, old web=1, new web=2, old web=0, old worker=0",
            id="the specification's worked example",
        ),
        pytest.param("one-down-one-up", start({"web": 2}, ("web",)), "old web=1, new web=1, old web=0, new web=2"),
        pytest.param(
            "discoverd-meta",
            start({"app": 1, "gone": 2}, ("app",)),
            "new app=1, old app=0, old gone=1, old gone=0",
            id="discoverd: both side by side, until the new one has taken over everywhere",
        ),
        pytest.param(
            "discoverd-meta",
            Progress(wanted={"app": 1}, types=("app",), old={"app": 0}, new={"app": 1}),
            "",
            id="discoverd: interrupted when it was done",
        ),
        pytest.param(
            "in-batches",
            start({"web": 5}, ("web",), 2),
            "new web=2, old web=3, new web=4, old web=1, new web=5, old web=0",
        ),
        pytest.param(
            "all-at-once",
            start({"web": 2, "worker": 1, "idle": 0}, ("web", "idle")),
            "new web=2, old web=0 unwaited, old worker=0 unwaited",
        ),
        pytest.param(
            "one-by-one",
            Progress(wanted={"web": 2}, types=("web",), old={"web": 2}, new={"web": 1}),
            "old web=1, new web=2, old web=0",
            id="resumed after the new one came up: the surplus goes first",
        ),
        pytest.param(
            "all-at-once",
            Progress(wanted={"web": 2}, types=("web",), old={"web": 2}, new={"web": 2}),
            "old web=0 unwaited",
            id="resumed after all new ones came up: the old ones still go",
        ),
        pytest.param("one-by-one", start({"web": 1}, ("web", "brand-new")), "new web=1, old web=0"),
        pytest.param(
            "one-by-one",
            Progress(wanted={"web": 1}, types=("web",), old={"web": 1, "extra": 2}, new={}),
            "old extra=1, old extra=0, new web=1, old web=0",
            id="what the old release was given meanwhile goes too",
        ),
        pytest.param("one-by-one", start({}, ("web",)), ""),
    ],
)
def test_steps(strategy: str, progress: Progress, steps: str) -> None:
    assert ", ".join(walk(strategy, progress)[0]) == steps


counts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 5), min_size=1)


@given(counts, counts, counts, st.sets(st.sampled_from(["a", "b", "c"])), st.integers(1, 3), st.data())
def test_from_any_state_every_strategy_ends_where_it_should(
    wanted: dict[str, int],
    old: dict[str, int],
    new: dict[str, int],
    types: set[str],
    batch: int,
    data: st.DataObject,
) -> None:
    strategies = ["all-at-once", "one-by-one", "one-down-one-up", "in-batches", "discoverd-meta"]
    strategy = data.draw(st.sampled_from(strategies))
    new = {name: min(count, wanted.get(name, 0)) for name, count in new.items() if name in types}
    progress = Progress(wanted=wanted, types=types, old=old, new=new, batch=batch)
    end = walk(strategy, progress)[1][-1]
    assert not any(end.old.values())
    assert all(end.new_count(name) == end.target(name) for name in wanted)


@given(counts, st.integers(1, 3))
def test_up_then_down_never_runs_fewer_than_wanted_nor_a_batch_more(wanted: dict[str, int], batch: int) -> None:
    for state in walk("in-batches", start(wanted, tuple(wanted), batch))[1]:
        for name, count in wanted.items():
            assert count <= state.new_count(name) + state.old_count(name) <= count + batch


def test_strategies_nobody_can_carry_out() -> None:
    for name in ("slowly", "sirenia"):
        with pytest.raises(UnsupportedStrategy, match=name):
            strategy_steps(name)


@pytest.mark.parametrize(
    ("strategy", "requested", "hosts", "size"),
    [("one-by-one", 4, 3, 1), ("in-batches", None, 3, 3), ("in-batches", 4, 3, 4), ("in-batches", 0, 0, 1)],
)
def test_batch_sizes(strategy: str, requested: int | None, hosts: int, size: int) -> None:
    assert batch_size(strategy, requested, hosts) == size


def test_failed_starts_in_words() -> None:
    assert failed_start_message("web", None) == "web job failed to start: got down job event"
    assert failed_start_message("web", "exec: no such file") == "web job failed to start: exec: no such file"


def pushed(number: int, slug: str) -> Release:
    return Release(id=f"r{number}", artifacts=["image", slug], meta={"git": "true"})


def test_garbage_keeps_the_newest_distinct_slugs() -> None:
    slugs = {name: Artifact(id=name, uri=name, meta={"blobstore": "true"}) for name in ("s1", "s2", "s3", "s4")}
    releases = [
        pushed(7, "s4"),
        Release(id="config", artifacts=["image"]),
        pushed(6, "s3"),
        pushed(5, "s3"),
        pushed(4, "s2"),
        pushed(3, "s1"),
        pushed(2, "s1"),
    ]
    assert releases_to_delete(releases, slugs, needed={"r7"}, keep=2) == ["r3", "r2"]
    assert releases_to_delete(releases, slugs, needed={"r7", "r3"}, keep=1) == ["r5", "r4", "r2"]
    assert releases_to_delete(releases, slugs, needed=set(), keep=10) == []


def test_the_garbage_setting() -> None:
    assert slugs_to_keep({}) is None
    assert slugs_to_keep({"gc.max_inactive_slug_releases": "false"}) is None
    assert slugs_to_keep({"gc.max_inactive_slug_releases": "3"}) == 3
    with pytest.raises(ValidationError):
        slugs_to_keep({"gc.max_inactive_slug_releases": "many"})
