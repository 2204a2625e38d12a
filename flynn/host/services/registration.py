"""Keeping the services of one job in discoverd: registered while healthy, gone as soon as it is to be left alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from flynn.aio.backoff import Backoff, attempts
from flynn.discoverd.registry import Registry
from flynn.host.services import health, probe
from flynn.host.services.health import Change, Check, Health
from flynn.types.errors import ApiError
from flynn.types.host import HostJob
from flynn.types.instance import Instance
from flynn.types.release import Port

log = logging.getLogger(__name__)

META_VARIABLES = ("FLYNN_APP_ID", "FLYNN_APP_NAME", "FLYNN_RELEASE_ID", "FLYNN_PROCESS_TYPE", "FLYNN_JOB_ID")
DEREGISTER_SECONDS = 5.0
RETRY = Backoff(limit=timedelta(seconds=1))

Kill = Callable[[], Awaitable[None]]


class JobServices:
    """The services of one running job. `run` until the job ends; `leave` to take it out of traffic before that."""

    def __init__(self, job: HostJob, address: str, registry: Registry, kill: Kill) -> None:
        self._job, self._address, self._registry, self._kill = job, address, registry, kill
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()

    @property
    def ports(self) -> list[Port]:
        return [port for port in self._job.config.ports if port.service is not None and port.service.name]

    async def run(self) -> None:
        """Register, probe, register and deregister; on cancellation or `leave` everything is deregistered."""
        try:
            async with asyncio.TaskGroup() as group:
                ports = [group.create_task(self._keep(port), name=f"service of {self._job.id}") for port in self.ports]
                await self._leaving.wait()
                for task in ports:
                    task.cancel()
        finally:
            self._left.set()

    async def leave(self) -> None:
        """Deregister now and stay so. Idempotent; returns when done, or when discoverd did not answer in time."""
        self._leaving.set()
        try:
            async with asyncio.timeout(DEREGISTER_SECONDS):
                await self._left.wait()
        except TimeoutError:
            log.warning("services of a job not deregistered in time", extra={"job": self._job.id})

    async def _keep(self, port: Port) -> None:
        assert port.service is not None
        name = port.service.name
        instance = Instance.at(f"{self._address}:{port.port}", port.proto, self._meta())
        if port.service.check is None:
            await self._registered_for_ever(name, instance)
        else:
            await self._registered_while_up(name, instance, Check.of(port.service.check), port.port)

    def _meta(self) -> dict[str, str]:
        env = self._job.config.env
        return {name: env[name] for name in META_VARIABLES if name in env}

    async def _registered_for_ever(self, name: str, instance: Instance) -> None:
        async for _ in attempts(RETRY):
            try:
                async with self._registry.registered(name, instance):
                    await asyncio.Event().wait()
            except ApiError as error:
                log.warning("service not registered", extra={"job": self._job.id, "service": name, "error": str(error)})

    async def _registered_while_up(self, name: str, instance: Instance, check: Check, port: int) -> None:
        loop = asyncio.get_running_loop()
        born, state = loop.time(), Health()
        async with asyncio.TaskGroup() as group:
            registration: asyncio.Task[None] | None = None
            while True:
                state, change = health.observe(state, await probe.succeeds(check, self._address, port), check.threshold)
                if change is Change.UP:
                    registration = group.create_task(self._registered_for_ever(name, instance))
                elif change is Change.DOWN and registration is not None:
                    log.info("service down", extra={"job": self._job.id, "service": name})
                    registration.cancel()
                overdue = not state.ever_up and loop.time() - born > check.start_timeout.total_seconds()
                if check.kill_down and (overdue or change is Change.DOWN):
                    log.info("killing a job whose service is down", extra={"job": self._job.id, "service": name})
                    await self._kill()
                await asyncio.sleep(health.pause(state, check).total_seconds())
