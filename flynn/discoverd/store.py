"""The replicated directory as a pure function: state + command -> new state + events.

Every member applies the same commands in the same order, so nothing here may depend on time, chance or the machine.
States are immutable and share what did not change, so a reader may keep one as long as it likes.

    commands   CreateService RemoveService PutMeta ChooseLeader PutInstance RemoveInstance Expire
    events     up update down leader service_meta, in the order watchers are to see them

Deviations from the original, all of them visible only where it misbehaved: removing a service removes its instances
and its leader; a leader that comes or goes in a manual service is an event; an expiry names the registration it is
about, so it cannot hit a later one of the same address. Rules of the wire (paths, names, JSON) are in `api`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from flynn.discoverd.leader import chosen_after_change, leader_of
from flynn.types.codec import replace
from flynn.types.errors import NotFound, ObjectExists, PreconditionFailed, ValidationError
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, LeaderType, ServiceMeta, instance_id


class Service(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One service. `chosen_leader` is an id somebody named, which need not (or not yet) be registered."""

    leader_type: str = LeaderType.OLDEST
    instances: dict[str, Instance] = {}  # in the order of their registration, so by rising index
    chosen_leader: str = ""
    meta: ServiceMeta | None = None
    had_instances: bool = False  # tells "gone already" from "never there" when an instance is removed twice

    @property
    def leader(self) -> Instance | None:
        return leader_of(self.leader_type, self.chosen_leader, self.instances)

    @property
    def sorted_instances(self) -> list[Instance]:
        return list(self.instances.values())


class Directory(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state. `index` is the log index of the last command applied, failed ones included."""

    index: int = 0
    services: dict[str, Service] = {}

    def service(self, name: str) -> Service:
        if (service := self.services.get(name)) is None:
            raise NotFound(f"service {name!r} not found")
        return service


class CreateService(msgspec.Struct, frozen=True, tag="create_service"):
    service: str
    leader_type: str = LeaderType.OLDEST


class RemoveService(msgspec.Struct, frozen=True, tag="remove_service"):
    service: str


class PutMeta(msgspec.Struct, frozen=True, tag="put_meta"):
    """Compare-and-set: `meta.index` is the index it replaces, 0 for "there is none yet"."""

    service: str
    meta: ServiceMeta


class ChooseLeader(msgspec.Struct, frozen=True, tag="choose_leader"):
    service: str
    instance_id: str


class PutInstance(msgspec.Struct, frozen=True, tag="put_instance"):
    service: str
    instance: Instance


class RemoveInstance(msgspec.Struct, frozen=True, tag="remove_instance"):
    service: str
    instance_id: str


JOB_META = "FLYNN_JOB_ID"


class Expired(msgspec.Struct, frozen=True):
    service: str
    instance_id: str
    index: int  # of the registration that ran out; a later registration of the same address is left alone


class Expire(msgspec.Struct, frozen=True, tag="expire"):
    registrations: list[Expired]


Command = CreateService | RemoveService | PutMeta | ChooseLeader | PutInstance | RemoveInstance | Expire


@dataclass(frozen=True, slots=True)
class Applied:
    state: Directory
    events: tuple[DiscoverdEvent, ...] = ()


def apply(state: Directory, index: int, command: Command) -> Applied:
    """Apply the command with log index `index`.

    Raises:
        ApiError: refused. The state is the old one; the index is used up all the same, see `skip`.
    """
    match command:
        case CreateService(name, leader_type):
            if name in state.services:
                raise ObjectExists(f"service {name!r} already exists")
            return Applied(_with(state, index, name, Service(leader_type=leader_type)))
        case RemoveService(name):
            gone = state.service(name)
            services = {key: value for key, value in state.services.items() if key != name}
            downs = tuple(_event(name, EventKind.DOWN, instance) for instance in gone.sorted_instances)
            return Applied(Directory(index=index, services=services), downs)
        case PutMeta(name, meta):
            return _put_meta(state, index, name, meta)
        case ChooseLeader(name, chosen):
            return _choose_leader(state, index, name, chosen)
        case PutInstance(name, instance):
            return _put_instance(state, index, name, instance)
        case RemoveInstance(name, gone_id):
            service = state.service(name)
            if not service.had_instances:
                raise NotFound(f"service {name!r} has no instances")
            return _drop(state, index, [(name, gone_id)])
        case Expire(registrations):
            return _drop(state, index, [(r.service, r.instance_id) for r in registrations if _is_registered(state, r)])


def registrations_of(state: Directory, job_id: str) -> list[Expired]:
    """What a job has registered, as far as it said who it is."""
    return [
        Expired(name, instance.id, instance.index)
        for name, service in state.services.items()
        for instance in service.instances.values()
        if instance.meta.get(JOB_META) == job_id
    ]


def skip(state: Directory, index: int) -> Directory:
    """The state after an entry that changed nothing: a refused command, or one of the log's own."""
    return Directory(index=index, services=state.services)


def same_registration(a: Instance, b: Instance) -> bool:
    """Whether `b` says nothing new about `a`, so that it is a mere heartbeat."""
    return (a.addr, a.proto, a.meta) == (b.addr, b.proto, b.meta)


def snapshot_events(name: str, service: Service | None) -> list[DiscoverdEvent]:
    """What a new watcher is told first, without the final `current`."""
    if service is None:
        return []
    events = [_event(name, EventKind.UP, instance) for instance in service.sorted_instances]
    if (leader := service.leader) is not None:
        events.append(_event(name, EventKind.LEADER, leader))
    if service.meta is not None:
        events.append(_meta_event(name, service.meta))
    return events


def check_service_name(name: str) -> None:
    if not _SERVICE_NAME.fullmatch(name):
        raise ValidationError("service", "must be lower case alphanumeric plus dash")


def check_leader_type(leader_type: str) -> None:
    """Empty is as good as `oldest`. A typing error would otherwise choose its leaders by age, unnoticed."""
    if leader_type not in ("", *LeaderType):
        raise ValidationError("leader_type", f"must be {' or '.join(LeaderType)}")


def check_instance(instance: Instance) -> None:
    """The rules of a registration, in the order in which clients are told about them."""
    if not instance.proto:
        raise ValidationError("proto", "must be set")
    if not _PROTO.fullmatch(instance.proto):
        raise ValidationError("proto", "must be lower case alphanumeric")
    if not _splits_into_host_and_port(instance.addr):
        raise ValidationError("addr", "must be host:port")
    if instance.id != (expected := instance_id(instance.proto, instance.addr)):
        raise ValidationError("id", f"is incorrect, expected {expected}")


_SERVICE_NAME = re.compile(r"[a-z0-9-]+")
_PROTO = re.compile(r"[a-z0-9]+")


def _splits_into_host_and_port(addr: str) -> bool:
    """As Go's net.SplitHostPort: the port need not be a number, the host may be empty, IPv6 stands in brackets."""
    if addr.startswith("["):
        host, closed, port = addr[1:].partition("]:")
        return bool(closed) and not (set("[]") & set(host + port)) and ":" not in port
    host, colon, port = addr.rpartition(":")
    return bool(colon) and not (set("[]:") & set(host)) and not (set("[]") & set(port))


def _put_meta(state: Directory, index: int, name: str, meta: ServiceMeta) -> Applied:
    service = state.service(name)
    if service.meta is None and meta.index != 0:
        raise PreconditionFailed(f"service {name!r} has no metadata, so there is no index {meta.index}")
    if service.meta is not None and meta.index == 0:
        raise ObjectExists(f"service {name!r} already has metadata")
    if service.meta is not None and meta.index != service.meta.index:
        raise PreconditionFailed(f"metadata of {name!r} is at index {service.meta.index}, not {meta.index}")
    stored = ServiceMeta(data=meta.data, index=index)
    changed = _replace(service, meta=stored)
    events = [_meta_event(name, stored)]
    if meta.leader_id:
        changed = _replace(changed, chosen_leader=meta.leader_id)
        events += _chosen_event(name, service, changed)
    return Applied(_with(state, index, name, changed), tuple(events))


def _choose_leader(state: Directory, index: int, name: str, chosen: str) -> Applied:
    service = state.services.get(name)
    if service is None or service.leader_type != LeaderType.MANUAL:
        raise ValidationError("", f"service {name!r} does not have a manually chosen leader")
    changed = _replace(service, chosen_leader=chosen)
    return Applied(_with(state, index, name, changed), tuple(_chosen_event(name, service, changed)))


def _put_instance(state: Directory, index: int, name: str, instance: Instance) -> Applied:
    service = state.service(name)
    known = service.instances.get(instance.id)
    if known is not None and same_registration(known, instance):
        return Applied(skip(state, index))
    stored = replace(instance, index=known.index if known else index)
    changed = _replace(service, instances=service.instances | {instance.id: stored}, had_instances=True)
    if known is not None:
        return Applied(_with(state, index, name, changed), (_event(name, EventKind.UPDATE, stored),))
    changed = _after_change(changed)
    events = (_event(name, EventKind.UP, stored), *_leader_change(name, service, changed))
    return Applied(_with(state, index, name, changed), events)


def _drop(state: Directory, index: int, targets: list[tuple[str, str]]) -> Applied:
    """Remove instances: first every `down`, then one look at the leader of each service touched."""
    gone: dict[str, list[Instance]] = {}
    for name, gone_id in targets:
        service = state.services.get(name)
        if service is not None and gone_id in service.instances:
            gone.setdefault(name, []).append(service.instances[gone_id])
    services = dict(state.services)
    leaders: list[DiscoverdEvent] = []
    for name, instances in gone.items():
        before = services[name]
        ids = {instance.id for instance in instances}
        rest = {key: value for key, value in before.instances.items() if key not in ids}
        services[name] = _after_change(_replace(before, instances=rest))
        leaders += _leader_change(name, before, services[name])
    downs = [_event(name, EventKind.DOWN, instance) for name, instances in gone.items() for instance in instances]
    return Applied(Directory(index=index, services=services), (*downs, *leaders))


def _is_registered(state: Directory, registration: Expired) -> bool:
    service = state.services.get(registration.service)
    known = service.instances.get(registration.instance_id) if service else None
    return known is not None and known.index == registration.index


def _after_change(service: Service) -> Service:
    return _replace(service, chosen_leader=chosen_after_change(service.leader_type, service.chosen_leader))


def _leader_change(name: str, before: Service, after: Service) -> list[DiscoverdEvent]:
    old, new = before.leader, after.leader
    return [] if (old and old.id) == (new and new.id) else [_event(name, EventKind.LEADER, new)]


def _chosen_event(name: str, before: Service, after: Service) -> list[DiscoverdEvent]:
    """An explicit choice is announced even when it confirms the leader; choosing an absentee may end a leadership."""
    if after.chosen_leader in after.instances:
        return [_event(name, EventKind.LEADER, after.leader)]
    return _leader_change(name, before, after)


def _event(name: str, kind: EventKind, instance: Instance | None) -> DiscoverdEvent:
    return DiscoverdEvent(service=name, kind=kind, instance=instance)


def _meta_event(name: str, meta: ServiceMeta) -> DiscoverdEvent:
    return DiscoverdEvent(service=name, kind=EventKind.SERVICE_META, service_meta=meta)


def _with(state: Directory, index: int, name: str, service: Service) -> Directory:
    return Directory(index=index, services={**state.services, name: service})


def _replace(service: Service, **changes: object) -> Service:
    return msgspec.structs.replace(service, **changes)


def encode_command(command: Command) -> bytes:
    return _command_encoder.encode(command)


def decode_command(raw: bytes) -> Command:
    return _command_decoder.decode(raw)


def encode_state(state: Directory) -> bytes:
    return _command_encoder.encode(state)


def decode_state(raw: bytes) -> Directory:
    return _state_decoder.decode(raw)


_command_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_state_decoder = msgspec.msgpack.Decoder(Directory)
