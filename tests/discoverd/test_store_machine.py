"""After any history: a watcher that adds up the events knows exactly the state, and leaders follow the rules."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flynn.discoverd import store
from flynn.discoverd.view import View
from flynn.types.errors import ApiError
from flynn.types.instance import DiscoverdEvent, EventKind, Instance, LeaderType, ServiceMeta

SERVICES = st.sampled_from(["old", "man"])
INSTANCES = [Instance.at(f"10.0.0.{n}:80", "http") for n in range(4)]
SOME_INSTANCE = st.sampled_from(INSTANCES)


class Watched(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = store.Directory()
        self.views = {"old": View(), "man": View()}

    def apply(self, command: store.Command) -> None:
        index = self.state.index + 1
        try:
            applied = store.apply(self.state, index, command)
        except ApiError:
            self.state = store.skip(self.state, index)
            return
        self.state = applied.state
        for event in applied.events:
            self.watch(event)
        if isinstance(command, store.RemoveService):
            # A removal is told by `down` events alone: whoever watches concludes the rest.
            self.views[command.service].leader = None
            self.views[command.service].meta = None

    def watch(self, event: DiscoverdEvent) -> None:
        view = self.views[event.service]
        known = event.instance is not None and event.instance.id in view.instances
        match event.kind:
            case EventKind.UP:
                assert not known, "up for an instance that is up"
            case EventKind.DOWN | EventKind.UPDATE:
                assert known, f"{event.kind} for an instance that is not up"
            case EventKind.LEADER:
                assert event.instance is None or known, "a leader that is not up"
        view.apply(event)

    @rule(service=SERVICES)
    def create(self, service: str) -> None:
        self.apply(store.CreateService(service, LeaderType.MANUAL if service == "man" else LeaderType.OLDEST))

    @rule(service=SERVICES, instance=SOME_INSTANCE, version=st.sampled_from(["", "1", "2"]))
    def register(self, service: str, instance: Instance, version: str) -> None:
        meta = {"v": version} if version else {}
        self.apply(store.PutInstance(service, Instance.at(instance.addr, instance.proto, meta)))

    @rule(service=SERVICES, instance=SOME_INSTANCE)
    def deregister(self, service: str, instance: Instance) -> None:
        self.apply(store.RemoveInstance(service, instance.id))

    @rule(service=SERVICES, instances=st.lists(SOME_INSTANCE, unique_by=lambda one: one.id), index=st.integers(1, 30))
    def expire(self, service: str, instances: list[Instance], index: int) -> None:
        known = self.state.services.get(service)
        indexes = {one.id: one.index for one in known.instances.values()} if known else {}
        self.apply(store.Expire([store.Expired(service, one.id, indexes.get(one.id, index)) for one in instances]))

    @rule(service=SERVICES, instance=SOME_INSTANCE)
    def choose(self, service: str, instance: Instance) -> None:
        self.apply(store.ChooseLeader(service, instance.id))

    @rule(service=SERVICES, data=st.integers(0, 3), stale=st.booleans(), leader=st.none() | SOME_INSTANCE)
    def put_meta(self, service: str, data: int, stale: bool, leader: Instance | None) -> None:
        known = self.state.services.get(service)
        index = known.meta.index if known and known.meta else 0
        meta = ServiceMeta(data=data, index=index + stale, leader_id=leader.id if leader else "")
        self.apply(store.PutMeta(service, meta))

    @rule(service=SERVICES)
    def remove(self, service: str) -> None:
        self.apply(store.RemoveService(service))

    @rule()
    def restart(self) -> None:
        self.state = store.decode_state(store.encode_state(self.state))

    @invariant()
    def watchers_know_the_state(self) -> None:
        for name, view in self.views.items():
            service = self.state.services.get(name)
            assert view.instances == (service.instances if service else {})
            assert (view.leader and view.leader.id) == (service and service.leader and service.leader.id)
            assert view.meta == (service.meta if service else None)

    @invariant()
    def the_oldest_leads_unless_somebody_was_chosen(self) -> None:
        service = self.state.services.get("old")
        if service is not None and not service.chosen_leader and service.instances:
            assert service.leader == service.sorted_instances[0]

    @invariant()
    def indexes_are_unique(self) -> None:
        indexes = [one.index for service in self.state.services.values() for one in service.instances.values()]
        assert len(indexes) == len(set(indexes))
        assert all(0 < index <= self.state.index for index in indexes)


TestWatched = Watched.TestCase
TestWatched.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
