"""Keeping the services of one job in discoverd: registered while healthy, gone as soon as it is to be left alone.

When the daemon stops, nothing is deregistered: the jobs go on, and the next daemon takes the heartbeats over within the
time to live of the instances. If there is no next daemon, the host is as good as dead and they expire.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flynn.host.discovery import Discovery
from flynn.host.services import health, probe
from flynn.host.services.announcement import Announcement
from flynn.host.services.health import Change, Check, Health, UnknownCheck
from flynn.types.errors import ApiError
from flynn.types.host import HostJob
from flynn.types.instance import Instance
from flynn.types.release import Port

log = logging.getLogger(__name__)

META_VARIABLES = ("FLYNN_APP_ID", "FLYNN_APP_NAME", "FLYNN_RELEASE_ID", "FLYNN_PROCESS_TYPE", "FLYNN_JOB_ID")
LEAVE_SECONDS = 5.0

Kill = Callable[[str], Awaitable[None]]
"""Ends the job; takes the reason, for whoever looks at the job afterwards."""


class JobServices:
    """The services of one running job. `run` until the job ends; `leave` to take it out of traffic."""

    def __init__(self, job: HostJob, address: str, discovery: Discovery, kill: Kill) -> None:
        self._job, self._address, self._discovery, self._kill = job, address, discovery, kill
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()
        self._registered: set[tuple[str, str]] = set()  # services and instance ids discoverd may know of us

    async def run(self) -> None:
        """Register, probe, register and deregister, until `leave`."""
        async with asyncio.TaskGroup() as group:
            ports = [
                group.create_task(self._keep(port), name=f"service {port.service.name} of {self._job.id}")
                for port in self._job.config.ports
                if port.service is not None and port.service.name
            ]
            await self._leaving.wait()
            for task in ports:
                task.cancel()
        for name, instance_id in list(self._registered):
            await self._deregister(name, instance_id)
        self._left.set()

    async def leave(self) -> None:
        """Deregister now and stay so. Idempotent; returns when done, or when discoverd did not answer in time."""
        self._leaving.set()
        if not self._registered:
            return
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._left.wait()
        except TimeoutError:
            log.warning("services of a job not deregistered in time", extra={"job": self._job.id})

    async def _keep(self, port: Port) -> None:
        assert port.service is not None
        name = port.service.name
        instance = Instance.at(f"{self._address}:{port.port}", port.proto, self._meta())
        await self._discovery.connected.wait()
        if port.service.check is None:
            await self._keep_registered(name, instance)
            return
        try:
            check = Check.of(port.service.check)
        except UnknownCheck as error:
            log.error("service not registered", extra={"job": self._job.id, "service": name, "error": str(error)})
            await self._kill(f"killed: {error}")
            return
        await self._registered_while_up(name, instance, check, port.port)

    def _meta(self) -> dict[str, str]:
        env = self._job.config.env
        return {name: env[name] for name in META_VARIABLES if name in env}

    async def _keep_registered(self, name: str, instance: Instance) -> None:
        self._registered.add((name, instance.id))
        await Announcement(self._discovery, name, instance).run()

    async def _deregister(self, name: str, instance_id: str) -> None:
        try:
            await self._discovery.registry.deregister(name, instance_id)
            self._registered.discard((name, instance_id))
        except ApiError as error:
            log.warning("service not deregistered", extra={"job": self._job.id, "service": name, "error": str(error)})

    async def _registered_while_up(self, name: str, instance: Instance, check: Check, port: int) -> None:
        loop = asyncio.get_running_loop()
        born, state = loop.time(), Health()
        async with asyncio.TaskGroup() as group:
            registration: asyncio.Task[None] | None = None
            while True:
                state, change = health.observe(state, await probe.succeeds(check, self._address, port), check.threshold)
                if change is Change.UP:
                    registration = group.create_task(self._keep_registered(name, instance))
                elif change is Change.DOWN and registration is not None:
                    log.info("service down", extra={"job": self._job.id, "service": name})
                    registration.cancel()
                    await asyncio.gather(registration, return_exceptions=True)
                    await self._deregister(name, instance.id)
                overdue = not state.ever_up and loop.time() - born > check.start_timeout.total_seconds()
                if check.kill_down and (overdue or change is Change.DOWN):
                    limit = check.start_timeout.total_seconds()
                    state_of_it = f"was not up within {limit:g} s" if overdue else "is down"
                    await self._kill(f"killed: the service {name} {state_of_it}")
                await asyncio.sleep(health.pause(state, check).total_seconds())
