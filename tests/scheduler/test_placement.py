"""Where new jobs go."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pytest import param

from flynn.scheduler import wire
from flynn.scheduler.model import Formation, Host, HostID, HostPort, JobID, Volume, VolumeID, VolumeState
from flynn.scheduler.placement import HOST_DOWN, NO_HOSTS, NO_MATCH, Chosen, Needs, Refused, place, rotated, spread
from flynn.types.app import App
from flynn.types.release import ProcessType, Release, VolumeReq
from flynn.types.volume import VolumeInfo

A, B, C = Host(HostID("a")), Host(HostID("b"), {"disk": "ssd"}), Host(HostID("c"), {"disk": "ssd", "zone": "1"})


@pytest.mark.parametrize(
    ("hosts", "load", "tags", "count", "chosen"),
    [
        param([A, B, C], {}, {}, 1, "a", id="the first of equals wins"),
        param([A, B, C], {"a": 1}, {}, 1, "b", id="fewest jobs win"),
        param([A, B, C], {"b": 9}, {"disk": "ssd"}, 1, "c", id="only hosts with the tag"),
        param([A, B, C], {"c": 9}, {"disk": "ssd", "zone": "1"}, 1, "c", id="all tags outrank load"),
        param([A, B, C], {}, {"disk": "hdd"}, 1, "", id="no host has that value"),
        param([A, B, C], {}, {}, 5, "abcab", id="many jobs go round"),
        param([A, B, C], {"a": 2, "b": 1}, {}, 4, "cbca", id="many jobs fill up the emptier hosts first"),
        param([replace(A, shutting_down=True), B], {}, {}, 2, "bb", id="never a host that goes away"),
        param([replace(A, healthy=False), B], {}, {}, 1, "b", id="a healthy host before one under suspicion"),
        param([replace(A, healthy=False)], {}, {}, 1, "a", id="a host under suspicion before none"),
        param([], {}, {}, 1, "", id="no hosts"),
    ],
)
def test_spread(hosts: list[Host], load: dict[HostID, int], tags: dict[str, str], count: int, chosen: str) -> None:
    assert "".join(host.id for host in spread(hosts, load, Needs(tags), count)) == chosen


def test_a_host_that_refused_is_taken_only_if_there_is_no_other() -> None:
    assert spread([A, B], {HostID("b"): 7}, Needs({}), 1, avoid=HostID("a"))[0] is B
    assert spread([A], {}, Needs({}), 1, avoid=HostID("a")) == [A]


GIB = 2**30
SMALL, LARGE = replace(A, memory=4 * GIB), replace(B, memory=16 * GIB)
PORT = frozenset({HostPort(80, "tcp")})


@pytest.mark.parametrize(
    ("needs", "load", "reserved", "chosen"),
    [
        param(Needs({}, memory=8 * GIB), {"b": 9}, {}, "b", id="where it could not run at all is no choice"),
        param(
            Needs({}, memory=1 * GIB), {}, {"a": 2 * GIB, "b": 4 * GIB}, "b", id="less is asked for of the larger one"
        ),
        param(Needs({}, memory=1 * GIB), {}, {"a": 1 * GIB, "b": 12 * GIB}, "a", id="and here of the smaller one"),
        param(Needs({}, memory=1 * GIB), {"b": 1}, {"a": 64 * GIB}, "a", id="spread outranks what is only asked for"),
        param(Needs({}, memory=32 * GIB), {}, {}, "no host has the 32.0 GiB of memory that it asks for", id="too big"),
        param(Needs({}, ports=PORT, taken=frozenset({A.id})), {}, {}, "b", id="not where another app has its port"),
        param(
            Needs({}, ports=PORT, taken=frozenset({A.id, B.id})),
            {},
            {},
            "on every host that fits a job has port 80/tcp",
            id="its port is taken everywhere",
        ),
        param(Needs({}, ports=PORT, alone=True), {"a": 1}, {}, "b", id="nor beside another one of its own type"),
    ],
)
def test_memory_and_ports(needs: Needs, load: dict[HostID, int], reserved: dict[HostID, int], chosen: str) -> None:
    found = spread([SMALL, LARGE], load, needs, 1, reserved=reserved)
    assert (found[0].id if found else needs.refusal([SMALL, LARGE])) == chosen


def test_a_machine_with_a_little_less_than_the_default_takes_jobs_that_ask_for_nothing_else() -> None:
    assert spread([replace(A, memory=GIB - GIB // 20)], {}, Needs({}, memory=GIB), 1)


def test_jobs_that_take_a_port_get_a_host_each_and_those_left_over_none() -> None:
    needs = Needs({}, ports=PORT, alone=True)
    assert spread([A, B], {}, needs, 3) == [A, B]
    assert spread([A, B], {HostID("a"): 1, HostID("b"): 1}, needs, 1) == []


def test_rotation_shows_every_host_once() -> None:
    assert [host.id for host in rotated([A, B, C], 5)] == ["c", "a", "b"]


class Balance(RuleBasedStateMachine):
    """Hosts come and jobs are placed; two hosts never differ by more than one job."""

    @initialize()
    def one_host(self) -> None:
        self.load = {HostID("h0"): 0}

    @rule(n=st.integers(0, 4))
    def add_host(self, n: int) -> None:
        self.load.setdefault(HostID(f"h{n}"), min(self.load.values()))

    @rule(data=st.data(), count=st.integers(1, 7))
    def place(self, data: st.DataObject, count: int) -> None:
        order = data.draw(st.permutations([Host(h) for h in self.load]))
        chosen = spread(order, self.load, Needs({}), count)
        assert len(chosen) == count
        for host in chosen:
            self.load[host.id] += 1

    @invariant()
    def even(self) -> None:
        assert max(self.load.values()) - min(self.load.values()) <= 1


TestBalance = Balance.TestCase

WAITS_FOR_B = f"{HOST_DOWN}: its volume is on b"
DATABASE = Formation(
    app=App(id="app", name="db"),
    release=Release(
        id="rel", processes={"db": ProcessType(volumes=[VolumeReq(path="/data"), VolumeReq(path="/wal", size=5 << 30)])}
    ),
    wanted={"db": 1},
)


def volume(id: str, host: str, path: str = "/data", **changes: object) -> Volume:
    made = Volume(VolumeID(id), HostID(host), "app", "rel", "db", path, state=VolumeState.CREATED)
    return replace(made, **changes)


def placed(volumes: list[Volume], hosts: list[Host]) -> Chosen | Refused:
    ids = count(1)
    return place(
        DATABASE,
        "db",
        JobID("j"),
        hosts,
        hosts,
        {},
        volumes,
        needs=Needs({}),
        new_volume_id=lambda: VolumeID(f"new{next(ids)}"),
    )


@pytest.mark.parametrize(
    ("volumes", "hosts", "result"),
    [
        param([], [A, B], "a new1 new2", id="without volumes new ones are made"),
        param([volume("v", "b")], [A, B], "b v new1", id="a free volume pins the job to its host"),
        param([volume("v", "b"), volume("w", "a", "/wal")], [A, B], "b v new1", id="all volumes end up on one host"),
        param([volume("v", "b", job=JobID("x"))], [A, B], "a new1 new2", id="a volume in use is not taken"),
        param([volume("v", "b", decommissioned=True)], [A, B], "a new1 new2", id="nor one that was decommissioned"),
        param([volume("v", "b", state=VolumeState.DESTROYED)], [A], "a new1 new2", id="nor one that is gone"),
        param([volume("v", "b")], [A], WAITS_FOR_B, id="data on a lost host is waited for"),
        param(
            [volume("v", "b")],
            [A, replace(B, shutting_down=True)],
            WAITS_FOR_B,
            id="also on one that goes away",
        ),
        param([volume("v", "z"), volume("w", "b")], [A, B], "b w new1", id="a volume at hand before one far away"),
        param([], [], NO_HOSTS, id="no hosts"),
    ],
)
def test_volumes(volumes: list[Volume], hosts: list[Host], result: str) -> None:
    match placed(volumes, hosts):
        case Refused(reason):
            assert reason == result
        case Chosen(host, bound):
            assert " ".join([host.id, *(v.id for v in bound)]) == result


def test_a_volume_on_a_host_that_lost_its_tags_blocks_the_job() -> None:
    formation = replace(DATABASE, tags={"db": {"disk": "ssd"}})
    verdict = place(
        formation,
        "db",
        JobID("j"),
        [A, B],
        [A, B],
        {},
        [volume("v", "a")],
        needs=Needs({"disk": "ssd"}),
        new_volume_id=lambda: VolumeID("n"),
    )
    assert verdict == Refused(NO_MATCH)


def test_a_new_volume_is_as_large_as_its_release_asks() -> None:
    chosen = placed([], [A])
    assert isinstance(chosen, Chosen)
    quotas = [wire.volume_request(made).meta.get("flynn.quota") for made in chosen.volumes]
    assert quotas == [None, str(5 << 30)]


def test_a_snapshot_of_an_apps_volume_is_not_a_volume_for_its_jobs() -> None:
    meta = {"flynn-controller.app": "app", "flynn-controller.path": "/data"}
    assert wire.volume_of_host(HostID("a"), VolumeInfo(id="v", meta=meta)) is not None
    frozen = VolumeInfo(id="s", meta={**meta, "flynn.snapshot-of": "v"})
    assert wire.volume_of_host(HostID("a"), frozen) is None
