"""The daemon as it starts: registered under its syslog address, with the lines of the instance before it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flynn.daemon import ConfigError
from flynn.http.server import Api, Request, listen
from flynn.identity import ANYONE, Identity
from flynn.identity.authority import ClusterCA
from flynn.logaggregator import client
from flynn.logaggregator.main import Config, running
from flynn.logaggregator.rfc5424 import encode, frame
from flynn.types.errors import NotFound
from flynn.types.instance import Instance
from tests.logaggregator.test_daemon import message


def directory_api(instances: dict[str, Instance]) -> Api:
    """discoverd, as far as this daemon asks; the oldest instance leads."""

    async def leader(request: Request) -> Instance:
        for instance in instances.values():
            return instance
        raise NotFound("no leader")

    async def register(request: Request) -> None:
        instances.setdefault(request.path("id"), await request.body(Instance))

    async def deregister(request: Request) -> None:
        instances.pop(request.path("id"), None)

    api = Api("discoverd")
    api.route("GET", "/services/logaggregator/leader", leader, allow=ANYONE)
    api.route("PUT", "/services/logaggregator/instances/{id}", register, allow=ANYONE)
    api.route("DELETE", "/services/logaggregator/instances/{id}", deregister, allow=ANYONE)
    return api


async def test_a_new_instance_begins_with_the_leaders_lines(tmp_path: Path) -> None:
    ca = ClusterCA.create()
    ca.issue_job("logaggregator", "app", "logaggregator", []).write(tmp_path / "own")
    ca.issue_job("discoverd", "app", "discoverd", []).write(tmp_path / "discoverd")
    ca.issue_host("host1", []).write(tmp_path / "host")
    own, host = Identity.load(tmp_path / "own"), Identity.load(tmp_path / "host")
    instances: dict[str, Instance] = {}
    async with listen(directory_api(instances), "127.0.0.1", 0, tls=Identity.load(tmp_path / "discoverd")) as (_, port):
        config = Config.from_environment(
            {
                "PORT_0": "0",
                "PORT_1": "0",
                "LISTEN_IP": "127.0.0.1",
                "EXTERNAL_IP": "127.0.0.1",
                "DISCOVERD": f"127.0.0.1:{port}",
                "FLYNN_IDENTITY": str(tmp_path / "own"),
                "FLYNN_JOB_ID": "host1-1",
            }
        )
        async with running(config):
            (first,) = instances.values()
            assert (first.proto, first.meta["FLYNN_JOB_ID"]) == ("tcp", "host1-1")
            async with client.sending(first, host) as stream, client.at(first, host) as aggregator:
                for n in range(1, 501):
                    stream.write(frame(encode(message(n))))
                async with asyncio.timeout(5):
                    while not (cursors := await aggregator.cursors()) or cursors["host1"].seq < 500:
                        await asyncio.sleep(0.01)
            async with running(config):
                (second,) = (instance for instance in instances.values() if instance.id != first.id)
                async with client.at(second, own) as successor:
                    assert [m.seq async for m in successor.snapshot()] == list(range(1, 501))
                async with client.at(second, host) as aggregator:
                    assert (await aggregator.cursors())["host1"].seq == 500
            assert list(instances) == [first.id]
        # A leader that is gone costs nothing but the history.
        instances["dead"] = Instance.at("127.0.0.1:1", "tcp", {client.API_PORT: "1"})
        async with running(config):
            assert len(instances) == 2


@pytest.mark.parametrize("name", ["PORT_0", "PORT_1"])
def test_a_bad_port_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Config.from_environment({name: "70000"})
