"""Join tokens: how long they are good, for how often, and who finds out what with a wrong one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import click
import pytest

from flynn.daemon import ConfigError
from flynn.host.api import HostApi
from flynn.host.cli.joining import ask
from flynn.host.enrolment import adopt_authority, authority, enrol
from flynn.host.joining import FAILURES, Joining, JoinRequest, JoinToken, JoinTokens, TokenRequest, pin_of
from flynn.host.state import StateStore
from flynn.http.server import listen
from flynn.identity import Identity
from flynn.identity.authority import ClusterCA
from flynn.types.codec import replace
from flynn.types.errors import Forbidden, ObjectExists, RateLimited, ValidationError

NEWCOMER = JoinRequest(id="node2", address="192.0.2.2")


class StoppedClock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return self.passed

    async def sleep(self, duration: timedelta) -> None:
        self.passed += duration.total_seconds()


@dataclass
class Cluster:
    """The joining side of one host, with its API on loopback."""

    directory: Path
    store: StateStore
    clock: StoppedClock = field(default_factory=StoppedClock)
    ca: ClusterCA = field(default_factory=ClusterCA.create)
    hosts: dict[str, str] = field(default_factory=lambda: {"node1": "192.0.2.1"})
    address: str = ""
    served: Joining | None = None

    async def token_of_the_server(self) -> JoinToken:
        assert self.served is not None
        return await self.token(self.served)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        self.ca.issue_host("node1", ["127.0.0.1"]).write(self.directory)
        parts: dict[str, Any] = dict.fromkeys(
            ("book", "runner", "attachments", "volumes", "sinks", "releases", "update")
        )
        self.served = self.joining()
        api = HostApi(node=cast(Any, self), joining=self.served, **parts).api()
        identity = Identity.load(self.directory)
        async with listen(api, "127.0.0.1", 0, tls=identity, require_client=False) as (host, port):
            self.address = f"{host}:{port}"
            yield

    def joining(self) -> Joining:
        return Joining(
            JoinTokens(self.store, self.clock), self.clock, ca=self.ca.pem, ca_key=self.ca.key_pem,
            own_address="192.0.2.1", http_port=1113,
        )  # fmt: skip

    async def token(self, joining: Joining, **wanted: int) -> JoinToken:
        made = await joining.invite(TokenRequest(**wanted))
        token = JoinToken.parse(made.token)
        return replace(token, addresses=[self.address]) if self.address else token


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    store = StateStore(tmp_path / "host.db")
    try:
        yield Cluster(tmp_path / "identity", store)
    finally:
        store.close()


async def join(
    joining: Joining, token: JoinToken, caller: str = "192.0.2.2", hosts: dict[str, str] | None = None
) -> Any:
    return await joining.welcome(replace(NEWCOMER, secret=token.secret), caller, hosts or {"node1": "192.0.2.1"})


async def test_a_newcomer_gets_the_authority_and_where_to_ask(cluster: Cluster) -> None:
    joining = cluster.joining()
    welcome = await join(joining, await cluster.token(joining), hosts={"node1": "192.0.2.1", "node3": "192.0.2.3"})
    assert welcome.ca.encode() == cluster.ca.pem
    assert welcome.ca_key.encode() == cluster.ca.key_pem
    assert welcome.peers == ["192.0.2.1", "192.0.2.3"]


async def test_a_token_is_good_for_as_often_as_it_says(cluster: Cluster) -> None:
    joining = cluster.joining()
    token = await cluster.token(joining, uses=2)
    await join(joining, token)
    await join(joining, token)
    with pytest.raises(Forbidden):
        await join(joining, token)


async def test_a_token_ends_with_its_time(cluster: Cluster) -> None:
    joining = cluster.joining()
    token = await cluster.token(joining, ttl=60)
    cluster.clock.passed = 60
    with pytest.raises(Forbidden):
        await join(joining, token)


async def test_uses_are_counted_across_a_restart(cluster: Cluster) -> None:
    joining = cluster.joining()
    token = await cluster.token(joining, uses=2)
    await join(joining, token)
    restarted = cluster.joining()
    await join(restarted, token)
    with pytest.raises(Forbidden):
        await join(cluster.joining(), token)


async def test_the_secret_itself_is_not_stored(cluster: Cluster) -> None:
    secret = (await cluster.token(cluster.joining())).secret.partition(".")[2]
    assert all(secret not in token.digest for token in cluster.store.join_tokens())


async def test_guessing_is_slowed_down_for_the_one_who_guesses(cluster: Cluster) -> None:
    joining = cluster.joining()
    token = await cluster.token(joining)
    for _ in range(FAILURES):
        with pytest.raises(Forbidden):
            await join(joining, replace(token, secret="0000000000000000.guess"), caller="203.0.113.9")
    with pytest.raises(RateLimited):
        await join(joining, token, caller="203.0.113.9")
    await join(joining, token, caller="192.0.2.2")
    cluster.clock.passed += 61
    with pytest.raises(Forbidden):
        await join(joining, token, caller="203.0.113.9")


@pytest.mark.parametrize(
    ("host_id", "address", "refusal"),
    [
        pytest.param("node-2", "192.0.2.2", ValidationError, id="ids have no dashes"),
        pytest.param("", "192.0.2.2", ValidationError, id="ids are not empty"),
        pytest.param("node2", "node2.example", ValidationError, id="addresses are numbers"),
        pytest.param("node1", "192.0.2.2", ObjectExists, id="another host's id"),
        pytest.param("node2", "192.0.2.1", ObjectExists, id="another host's address"),
    ],
)
async def test_a_newcomer_that_cannot_be_costs_no_use(
    cluster: Cluster, host_id: str, address: str, refusal: type[Exception]
) -> None:
    joining = cluster.joining()
    token = await cluster.token(joining)
    with pytest.raises(refusal):
        request = JoinRequest(secret=token.secret, id=host_id, address=address)
        await joining.welcome(request, "192.0.2.2", {"node1": "192.0.2.1"})
    await join(joining, token)


async def test_a_host_that_lost_its_state_may_join_again_under_its_name(cluster: Cluster) -> None:
    joining = cluster.joining()
    await join(joining, await cluster.token(joining), hosts={"node1": "192.0.2.1", "node2": "192.0.2.2"})


@pytest.mark.parametrize("wanted", [{"ttl": 0}, {"ttl": 8 * 86400}, {"uses": 0}, {"uses": 10**6}])
async def test_tokens_have_limits(cluster: Cluster, wanted: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        await cluster.token(cluster.joining(), **wanted)


@pytest.mark.parametrize("text", ["", "flynn1.", "flynn1.!!!", "flynn1.e30", "other.abc", "flynn1.eyJwaW4iOiJ6eiJ9"])
def test_what_is_not_a_token_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        JoinToken.parse(text)


# Over the wire.


async def test_joining_over_tls(cluster: Cluster, tmp_path: Path) -> None:
    async with cluster.serving():
        welcome = await ask(await cluster.token_of_the_server(), NEWCOMER)
    new = tmp_path / "new"
    adopt_authority(new, welcome.ca.encode(), welcome.ca_key.encode())
    enrol(state_dir=new, config_dir=tmp_path / "etc", host_id="node2", external_ip="192.0.2.2", args=["--id", "node2"])
    assert authority(new / "identity").pem == cluster.ca.pem
    assert len((tmp_path / "etc" / "host.key").read_text().strip()) == 64


async def test_the_secret_is_not_told_to_a_cluster_with_another_pin(cluster: Cluster) -> None:
    async with cluster.serving():
        token = await cluster.token_of_the_server()
        with pytest.raises(click.ClickException, match="not of the cluster"):
            await ask(replace(token, pin=pin_of(ClusterCA.create().pem)), NEWCOMER)
        await ask(token, NEWCOMER)  # so it has not been used


async def test_one_who_shows_the_right_authority_but_has_no_certificate_of_it_gets_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    impostor = Cluster(tmp_path / "impostor", cluster.store)
    impostor.ca.issue_host("node1", ["127.0.0.1"]).write(impostor.directory)
    joining = cluster.joining()
    parts: dict[str, Any] = dict.fromkeys(("book", "runner", "attachments", "volumes", "sinks", "releases", "update"))
    api = HostApi(node=cast(Any, cluster), joining=joining, **parts).api()
    identity = Identity.load(impostor.directory)
    async with listen(api, "127.0.0.1", 0, tls=identity, require_client=False) as (host, port):
        token = replace(await cluster.token(joining), addresses=[f"{host}:{port}"])
        with pytest.raises(click.ClickException, match="no host answers"):
            await ask(token, NEWCOMER)
    await join(joining, token)


async def test_only_joining_is_open_to_strangers(cluster: Cluster) -> None:
    async with cluster.serving():
        token = await cluster.token_of_the_server()
        with pytest.raises(Forbidden):
            await ask(replace(token, secret="nobody.knows"), NEWCOMER)


def test_a_machine_of_another_cluster_is_left_alone(tmp_path: Path) -> None:
    first, second = ClusterCA.create(), ClusterCA.create()
    adopt_authority(tmp_path, first.pem, first.key_pem)
    adopt_authority(tmp_path, first.pem, first.key_pem)
    with pytest.raises(ConfigError, match="another cluster"):
        adopt_authority(tmp_path, second.pem, second.key_pem)
