"""Job records, kills, and one-off runs on a host that is only as real as its API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from flynn.controller.client import Controller
from flynn.host import attach
from flynn.http.server import Api, Request, listen
from flynn.identity import access
from flynn.types.codec import Wire
from flynn.types.errors import ApiError, Conflict, NotFound, RateLimited, ServiceUnavailable, ValidationError
from flynn.types.host import AttachReq, HostJob
from flynn.types.instance import Instance
from flynn.types.job import Job, NewJob
from flynn.types.volume import VolumeInfo, VolumeRequest

from .conftest import Shop, World


def a_job(shop: Shop, **changes: object) -> Job:
    uuid = str(uuid4())
    defaults = {"uuid": uuid, "id": f"node1-{uuid}", "host_id": "node1", "app": shop.app.id}
    return Job(**{**defaults, "release": shop.release.id, "type": "web", "state": "up", **changes})  # type: ignore[arg-type]


async def test_a_job_is_found_by_both_its_ids(controller: Controller, shop: Shop) -> None:
    job = await controller.put_job(a_job(shop, meta={"a": "b"}, args=["web"]))
    assert await controller.job("shop", job.uuid) == job
    assert await controller.job("shop", job.id) == job
    for unknown in (str(uuid4()), "node2-" + job.uuid, "nonsense", "-"):
        with pytest.raises(NotFound):
            await controller.job("shop", unknown)


async def test_the_build_before_the_first_release_is_a_job_like_others(controller: Controller, shop: Shop) -> None:
    job = await controller.put_job(a_job(shop, release="", type="slugbuilder"))
    assert (await controller.jobs("shop"), job.release) == ([job], "")


async def test_each_state_is_told_once(controller: Controller, shop: Shop) -> None:
    job = a_job(shop, state="pending")
    for state in ("pending", "blocked", "starting", "up", "up", "down", "up"):
        await controller.put_job(a_job(shop, uuid=job.uuid, state=state))
    events = await controller.events(object_types=["job"], object_id=job.uuid)
    assert [event.data["state"] for event in reversed(events)] == ["pending", "blocked", "starting", "up", "down"]
    assert (await controller.job("shop", job.uuid)).state == "up"


async def test_only_live_jobs_are_active(controller: Controller, shop: Shop) -> None:
    up = await controller.put_job(a_job(shop))
    down = await controller.put_job(a_job(shop, state="down", exit_status=1, host_error="oom"))
    assert [job.uuid for job in await controller.active_jobs()] == [up.uuid]
    assert [job.uuid for job in await controller.jobs("shop")] == [down.uuid, up.uuid]


async def test_volumes_keep_their_order(controller: Controller, shop: Shop) -> None:
    volumes = [str(uuid4()) for _ in range(3)]
    job = await controller.put_job(a_job(shop, volumes=volumes))
    assert (await controller.job("shop", job.uuid)).volumes == volumes


@pytest.mark.parametrize(
    "changes",
    [{"state": "happy"}, {"app": "x"}, {"release": "x"}, {"app": str(uuid4())}, {"uuid": "x"}, {"volumes": ["x"]}],
    ids=["state", "app", "release", "unknown app", "uuid", "volume"],
)
async def test_bad_records_are_the_clients_mistake(
    controller: Controller, shop: Shop, changes: dict[str, object]
) -> None:
    with pytest.raises(ValidationError):
        await controller._http.put("/apps/shop/jobs/x", a_job(shop, **changes))


@dataclass
class FakeHost:
    """The part of the host API that the controller uses."""

    jobs: dict[str, HostJob] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    attached: AttachReq | None = None
    refusals: list[Exception] = field(default_factory=list)
    volume: VolumeRequest | None = None

    def api(self) -> Api:
        api = Api("flynn-host")
        insiders = access("app:controller")
        api.route("PUT", "/host/jobs/{id}", self.add, allow=insiders)
        api.route("DELETE", "/host/jobs/{id}", self.stop, allow=insiders)
        api.route("POST", "/attach", self.attach, allow=insiders)
        api.route("POST", "/storage/providers/default/volumes", self.create_volume, allow=insiders)
        return api

    async def add(self, request: Request) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.jobs[request.path("id")] = await request.body(HostJob)

    async def stop(self, request: Request) -> None:
        if request.path("id") not in self.jobs:
            raise NotFound("no such job")
        self.stopped.append(request.path("id"))

    async def create_volume(self, request: Request) -> Wire:
        self.volume = await request.body(VolumeRequest)
        return VolumeInfo(id=self.volume.id, type="data", meta=self.volume.meta)

    async def attach(self, request: Request) -> None:
        """Echo stdin, then end with status 3."""
        self.attached = await request.body(AttachReq)
        async with await request.upgrade(attach.PROTOCOL) as connection:
            connection.write(attach.encode(attach.Waiting()))
            await connection.drain()
            async with asyncio.timeout(1):
                while self.attached.job_id not in self.jobs:
                    await asyncio.sleep(0.01)
                connection.write(attach.encode(attach.Attached()))
                while isinstance(frame := await attach.read_client_frame(connection), attach.Data) and frame.data:
                    connection.write(attach.encode(attach.Data(attach.Stream.STDOUT, b"echo " + frame.data)))
                connection.write(attach.encode(attach.Exit(3)))
                await connection.drain()


@pytest.fixture
async def host(world: World) -> AsyncIterator[FakeHost]:
    host = FakeHost()
    async with listen(host.api(), "127.0.0.1", 0, tls=world.identities.app("node1")) as (address, port):
        await world.registry.create("flynn-host")
        await world.registry.register("flynn-host", Instance.at(f"{address}:{port}", "https", {"id": "node1"}))
        yield host


async def test_killing_reaches_the_host(controller: Controller, shop: Shop, host: FakeHost) -> None:
    job = await controller.put_job(a_job(shop))
    host.jobs[job.id] = HostJob(id=job.id)
    await controller.kill_job("shop", job.id)
    assert host.stopped == [job.id]
    unplaced = await controller.put_job(a_job(shop, id="", host_id=""))
    with pytest.raises(ValidationError, match="cannot kill a job which has not been placed on a host"):
        await controller.kill_job("shop", unplaced.uuid)
    elsewhere = await controller.put_job(a_job(shop, host_id="node9"))
    with pytest.raises(ServiceUnavailable, match="host node9 is not there"):
        await controller.kill_job("shop", elsewhere.uuid)


async def test_a_detached_run(controller: Controller, shop: Shop, host: FakeHost) -> None:
    wanted = NewJob(
        release=shop.release.id,
        args=["rake", "db:migrate"],
        env={"A": "mine"},
        release_env=True,
        meta={"why": "test", "flynn-controller.app": "a lie"},
        data=True,
    )
    job = await controller.run_job("shop", wanted)
    assert (job.id, job.host_id, job.args) == (f"node1-{job.uuid}", "node1", ["rake", "db:migrate"])
    sent = host.jobs[job.id]
    assert sent.config.env["A"] == "mine" and sent.config.env["FROM_IMAGE"] == "yes"
    assert sent.config.env["FLYNN_APP_ID"] == shop.app.id and sent.config.env["FLYNN_PROCESS_TYPE"] == ""
    assert sent.metadata["flynn-controller.app"] == shop.app.id and sent.metadata["why"] == "test"
    assert [mount.url for mount in sent.mountspecs] == ["file:///l/layer1"]
    assert not sent.config.stdin and sent.config.working_dir == "/srv"
    assert host.volume is not None and host.volume.meta["flynn-controller.path"] == "/data"
    assert sent.config.volumes[0].delete_on_stop


async def test_a_host_that_is_busy_is_asked_again_and_one_that_refuses_is_quoted(
    controller: Controller, shop: Shop, host: FakeHost
) -> None:
    host.refusals = [RateLimited("too many"), RateLimited("too many")]
    assert (await controller.run_job("shop", NewJob(release=shop.release.id))).id in host.jobs
    host.refusals = [Conflict("the volume is in use")]
    with pytest.raises(Conflict, match="the volume is in use"):
        await controller.run_job("shop", NewJob(release=shop.release.id))


async def test_an_attached_run(controller: Controller, shop: Shop, host: FakeHost) -> None:
    wanted = NewJob(release=shop.release.id, args=["cat"], tty=True, tty_lines=40, tty_columns=80)
    async with controller.run_job_attached("shop", wanted) as connection:
        assert host.attached is not None
        assert (host.attached.flags, host.attached.height, host.attached.width) == (23, 40, 80)
        assert host.jobs[host.attached.job_id].config.stdin and host.jobs[host.attached.job_id].config.tty
        connection.write(attach.encode(attach.Data(attach.Stream.STDIN, b"hello")))
        connection.write(attach.encode(attach.Data(attach.Stream.STDIN, b"")))
        await connection.drain()
        frames = [frame async for frame in attach.server_frames(connection)]
    assert frames == [attach.Data(attach.Stream.STDOUT, b"echo hello"), attach.Exit(3)]


async def test_what_cannot_run_is_refused_before_the_upgrade(
    controller: Controller, shop: Shop, host: FakeHost
) -> None:
    with pytest.raises(NotFound):
        async with controller.run_job_attached("shop", NewJob(release=str(uuid4()))):
            pass
    with pytest.raises(ValidationError, match="partition"):
        async with controller.run_job_attached("shop", NewJob(release=shop.release.id, partition="moon")):
            pass
    host.refusals = [Conflict("no")]
    with pytest.raises(Conflict):
        async with controller.run_job_attached("shop", NewJob(release=shop.release.id)):
            pass


async def test_without_hosts_nothing_runs(controller: Controller, shop: Shop) -> None:
    with pytest.raises(ApiError, match="there is no host") as refused:
        await controller.run_job("shop", NewJob(release=shop.release.id))
    assert not refused.value.retry
