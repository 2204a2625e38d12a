"""The rules of the directory: what each command changes, and which events watchers see in which order."""

from __future__ import annotations

import pytest

from flynn.discoverd import store
from flynn.discoverd.store import (
    ChooseLeader,
    Command,
    CreateService,
    Directory,
    Expire,
    Expired,
    PutInstance,
    PutMeta,
    RemoveInstance,
    RemoveService,
)
from flynn.types.errors import ApiError, NotFound, ObjectExists, PreconditionFailed, ValidationError
from flynn.types.instance import Instance, ServiceMeta

A, B, C = (Instance.at(f"10.0.0.{n}:80", "http") for n in (1, 2, 3))
NAMES = {A.id: "a", B.id: "b", C.id: "c"}


def play(*commands: Command, state: Directory | None = None) -> tuple[Directory, list[str]]:
    """Apply the commands with indexes 1, 2, 3 ...; the events as words, refused ones as the class of the refusal."""
    state, story = state or Directory(), []
    for command in commands:
        index = state.index + 1
        try:
            applied = store.apply(state, index, command)
        except ApiError as refusal:
            state = store.skip(state, index)
            story.append(type(refusal).__name__)
            continue
        state = applied.state
        for event in applied.events:
            what = (
                NAMES[event.instance.id] if event.instance else event.service_meta.data if event.service_meta else "-"
            )
            story.append(f"{event.kind} {what}")
    return state, story


def put(instance: Instance, **meta: str) -> PutInstance:
    return PutInstance("web", Instance.at(instance.addr, instance.proto, meta))


def meta(data: object, index: int, leader: Instance | None = None) -> PutMeta:
    return PutMeta("web", ServiceMeta(data=data, index=index, leader_id=leader.id if leader else ""))


OLDEST, MANUAL = CreateService("web", "oldest"), CreateService("web", "manual")


@pytest.mark.parametrize(
    ("commands", "story"),
    [
        pytest.param([OLDEST, OLDEST], ["ObjectExists"], id="a service is created once"),
        pytest.param([put(A)], ["NotFound"], id="no instance without its service"),
        pytest.param([OLDEST, put(A)], ["up a", "leader a"], id="the first instance leads"),
        pytest.param([OLDEST, put(A), put(B)], ["up a", "leader a", "up b"], id="the second does not"),
        pytest.param([OLDEST, put(A), put(A)], ["up a", "leader a"], id="an identical registration is a heartbeat"),
        pytest.param([OLDEST, put(A), put(A, x="y")], ["up a", "leader a", "update a"], id="new metadata is an update"),
        pytest.param(
            [OLDEST, put(A), put(B), put(A, x="y"), RemoveInstance("web", B.id)],
            ["up a", "leader a", "up b", "update a", "down b"],
            id="an update keeps the age",
        ),
        pytest.param(
            [OLDEST, put(A), put(B), RemoveInstance("web", A.id)],
            ["up a", "leader a", "up b", "down a", "leader b"],
            id="the next oldest follows",
        ),
        pytest.param(
            [OLDEST, put(A), RemoveInstance("web", A.id)],
            ["up a", "leader a", "down a", "leader -"],
            id="the last one leaves no leader",
        ),
        pytest.param(
            [OLDEST, put(A), put(B), RemoveInstance("web", A.id), put(A), RemoveInstance("web", B.id)],
            ["up a", "leader a", "up b", "down a", "leader b", "up a", "down b", "leader a"],
            id="who comes back is the youngest",
        ),
        pytest.param(
            [OLDEST, RemoveInstance("web", A.id)], ["NotFound"], id="nothing to remove where nothing ever was"
        ),
        pytest.param(
            [OLDEST, put(A), RemoveInstance("web", A.id), RemoveInstance("web", A.id)],
            ["up a", "leader a", "down a", "leader -"],
            id="removing twice is fine",
        ),
        pytest.param(
            [OLDEST, put(A), put(B), put(C), Expire([Expired("web", A.id, 2), Expired("web", B.id, 3)])],
            ["up a", "leader a", "up b", "up c", "down a", "down b", "leader c"],
            id="a batch expires with one look at the leader",
        ),
        pytest.param(
            [OLDEST, put(A), RemoveInstance("web", A.id), put(A), Expire([Expired("web", A.id, 2)])],
            ["up a", "leader a", "down a", "leader -", "up a", "leader a"],
            id="an expiry spares a later registration",
        ),
        pytest.param(
            [OLDEST, put(A), put(B), meta("m", 0), RemoveService("web")],
            ["up a", "leader a", "up b", "service_meta m", "down a", "down b"],
            id="removing a service takes its instances down",
        ),
        pytest.param(
            [OLDEST, put(A), RemoveService("web"), put(A), OLDEST, RemoveInstance("web", A.id)],
            ["up a", "leader a", "down a", "NotFound", "NotFound"],
            id="a removed service is forgotten",
        ),
        pytest.param([RemoveService("web")], ["NotFound"], id="an unknown service cannot be removed"),
        pytest.param([meta(1, 0)], ["NotFound"], id="no metadata without a service"),
        pytest.param([OLDEST, meta(1, 0), meta(2, 0)], ["service_meta 1", "ObjectExists"], id="index 0 creates"),
        pytest.param([OLDEST, meta(1, 7)], ["PreconditionFailed"], id="an index where nothing is"),
        pytest.param(
            [OLDEST, meta(1, 0), meta(2, 2), meta(3, 2), meta(3, 3)],
            ["service_meta 1", "service_meta 2", "PreconditionFailed", "service_meta 3"],
            id="compare-and-set",
        ),
        pytest.param(
            [OLDEST, ChooseLeader("web", A.id)], ["ValidationError"], id="oldest services choose for themselves"
        ),
        pytest.param([ChooseLeader("web", A.id)], ["ValidationError"], id="no leader for an unknown service"),
        pytest.param(
            [MANUAL, put(A), put(B), ChooseLeader("web", B.id)], ["up a", "up b", "leader b"], id="a chosen leader"
        ),
        pytest.param(
            [MANUAL, put(A), ChooseLeader("web", A.id), ChooseLeader("web", A.id)],
            ["up a", "leader a", "leader a"],
            id="a choice is announced even if it changes nothing",
        ),
        pytest.param(
            [MANUAL, ChooseLeader("web", A.id), put(A)], ["up a", "leader a"], id="a leader chosen before it came"
        ),
        pytest.param(
            [MANUAL, put(A), ChooseLeader("web", A.id), RemoveInstance("web", A.id), put(A)],
            ["up a", "leader a", "down a", "leader -", "up a", "leader a"],
            id="a chosen leader goes and comes back",
        ),
        pytest.param(
            [MANUAL, put(A), put(B), meta("s", 0, leader=B)],
            ["up a", "up b", "service_meta s", "leader b"],
            id="metadata and leader in one write",
        ),
        pytest.param(
            [OLDEST, put(A), put(B), meta("s", 0, leader=B), put(C)],
            ["up a", "leader a", "up b", "service_meta s", "leader b", "up c", "leader a"],
            id="in an oldest service a choice lasts until the next change",
        ),
    ],
)
def test_events(commands: list[Command], story: list[str]) -> None:
    assert play(*commands)[1] == story


def test_an_update_keeps_the_index_and_a_new_registration_gets_one() -> None:
    state, _ = play(OLDEST, put(A), put(B), put(A, x="y"), RemoveInstance("web", B.id), put(B))
    assert {NAMES[one.id]: one.index for one in state.service("web").sorted_instances} == {"a": 2, "b": 6}


def test_a_failed_command_uses_an_index_and_changes_nothing_else() -> None:
    before, _ = play(OLDEST, put(A))
    after, _ = play(OLDEST, state=before)
    assert (after.index, after.services) == (before.index + 1, before.services)


def test_the_leader_id_of_a_write_is_not_stored_in_the_metadata() -> None:
    state, _ = play(MANUAL, put(A), meta("s", 0, leader=A))
    assert state.service("web").meta == ServiceMeta(data="s", index=3)


def test_state_and_commands_survive_encoding() -> None:
    state, _ = play(MANUAL, put(A, x="y"), ChooseLeader("web", A.id), meta({"n": [1, None, "x"]}, 0))
    assert store.decode_state(store.encode_state(state)) == state
    assert store.decode_state(store.encode_state(Directory())) == Directory()
    for command in (OLDEST, put(A, x="y"), meta({"n": 1}, 0), Expire([Expired("web", A.id, 4)])):
        assert store.decode_command(store.encode_command(command)) == command


def test_a_new_watcher_is_told_instances_then_leader_then_metadata() -> None:
    state, _ = play(OLDEST, put(B), put(A), meta("m", 0))
    events = store.snapshot_events("web", state.service("web"))
    kinds = [(event.kind.value, NAMES.get(event.instance.id) if event.instance else "") for event in events]
    assert kinds == [("up", "b"), ("up", "a"), ("leader", "b"), ("service_meta", "")]


@pytest.mark.parametrize("name", ["web", "a-1", "0"])
def test_good_service_names(name: str) -> None:
    store.check_service_name(name)


@pytest.mark.parametrize("name", ["", "Web", "a_b", "a.b", "a/b", "ä"])
def test_bad_service_names(name: str) -> None:
    with pytest.raises(ValidationError):
        store.check_service_name(name)


@pytest.mark.parametrize(
    ("addr", "proto", "field"),
    [
        ("1.2.3.4:80", "http", None),
        (":80", "tcp", None),
        ("name:http", "tcp", None),
        ("[::1]:80", "tcp", None),
        ("1.2.3.4:80", "", "proto"),
        ("1.2.3.4:80", "HTTP", "proto"),
        ("1.2.3.4", "tcp", "addr"),
        ("::1:80", "tcp", "addr"),
        ("[::1]80", "tcp", "addr"),
        ("[::1]", "tcp", "addr"),
    ],
)
def test_instances_are_checked(addr: str, proto: str, field: str | None) -> None:
    if field is None:
        store.check_instance(Instance.at(addr, proto))
        return
    with pytest.raises(ValidationError) as refusal:
        store.check_instance(Instance.at(addr, proto))
    assert refusal.value.field == field


def test_the_id_must_be_the_hash_of_protocol_and_address() -> None:
    assert Instance.at("127.0.0.1:80", "tcp").id == "cb6ddf019e39bc41371b307e22939e3d"
    with pytest.raises(ValidationError, match="id is incorrect"):
        store.check_instance(Instance(id="x", addr="127.0.0.1:80", proto="tcp"))


def test_refusals_are_the_classes_that_cross_the_wire() -> None:
    assert {NotFound.status, ObjectExists.status, PreconditionFailed.status} == {404, 409, 412}
