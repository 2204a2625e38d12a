"""What a scheduler tells of itself over HTTP, and to whom."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from random import Random

import pytest

from flynn.aio.clock import SystemClock
from flynn.aio.supervisor import TaskSet
from flynn.discoverd.memory import MemoryRegistry
from flynn.http.client import HttpClient
from flynn.http.server import listen
from flynn.scheduler.engine import Engine
from flynn.scheduler.events import (
    FormationReceived,
    FormationsListed,
    HostDescribed,
    HostSeen,
    JobsListed,
    LeadershipChanged,
    RecordsListed,
    VolumesRecorded,
)
from flynn.scheduler.loop import SchedulerLoop
from flynn.scheduler.main import status_api
from flynn.scheduler.mandate import Mandate
from flynn.scheduler.model import Formation, HostID
from flynn.types.app import App
from flynn.types.errors import Unreachable
from flynn.types.release import ProcessType, Release
from tests.controller.conftest import Identities, identities
from tests.scheduler.test_loop import MemoryController
from tests.scheduler.test_simulation import START

__all__ = ["identities"]

H1 = HostID("h1")
SECRET = "not to be told"


@pytest.fixture
async def address(identities: Identities) -> AsyncIterator[str]:
    """A scheduler that leads one host, and has a job for which no host has the tag."""
    process = {"web": ProcessType(env={"KEY": SECRET})}
    formation = Formation(
        App(id="shop", name="shop"),
        Release(id="rel", env={"KEY": SECRET}, processes=process),
        wanted={"web": 1},
        tags={"web": {"disk": "ssd"}},
    )

    def dial(*arguments: object) -> object:
        raise AssertionError("nothing runs here")

    async with TaskSet() as tasks:
        engine = Engine(Random(1), lambda: "u1")
        registry, controller = MemoryRegistry(), MemoryController()
        loop = SchedulerLoop(engine, registry, controller, dial, dial, SystemClock(), tasks, Mandate())  # type: ignore[arg-type]
        engine.step([HostSeen(H1, {"disk": "hdd"}), HostDescribed(H1, 2**34), FormationReceived(formation)], START)
        engine.step([LeadershipChanged(True), JobsListed(H1, (), START), FormationsListed((formation,), START)], START)
        engine.step([RecordsListed((), START), VolumesRecorded()], START)
        async with listen(status_api(loop, "h1-me"), "127.0.0.1", 0, tls=identities.app("controller")) as (host, port):
            yield f"https://{host}:{port}"


async def test_state_status_and_figures(address: str, identities: Identities) -> None:
    async with HttpClient(address, tls=identities.app("router")) as http:
        state = await http.get("/debug/state", answer=dict)
        assert (state["job_id"], state["is_leader"]) == ("h1-me", True)
        (job,) = state["jobs"].values()
        assert (job["state"], job["reason"]) == ("blocked", "no hosts found matching job tags")
        assert state["hosts"]["h1"]["memory"] == 2**34
        assert state["formations"]["shop:rel"]["original_processes"] == {"web": 1}
        figures = (await http.get("/metrics", answer=bytes)).decode()
        assert 'flynn_scheduler_jobs_blocked{reason="no hosts found matching job tags"} 1' in figures
        status = await http.get("/.well-known/status", answer=dict)
        assert status["data"]["detail"] == {"leader": True, "settled": True, "untold": 0}
        assert SECRET not in str(state) + figures


def without_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def test_who_has_no_certificate_of_the_platform_is_told_nothing(address: str) -> None:
    async with HttpClient(address, tls=without_certificate()) as http:
        for path in ("/.well-known/status", "/debug/state", "/metrics"):
            with pytest.raises(Unreachable):
                await http.get(path, answer=bytes)
