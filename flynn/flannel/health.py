"""Whether this machine reaches the others through the overlay, asked of the others' agents."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flynn.flannel.document import Lease
from flynn.http.client import HttpClient
from flynn.identity import Identity
from flynn.types.errors import ApiError
from flynn.types.status import Health, Status
from flynn.version import VERSION

PING_SECONDS = 1.0
AT_A_TIME = 5
SERVER_NAME = "flannel.discoverd"


@dataclass(frozen=True, slots=True)
class Reachability:
    identity: Identity
    others: Callable[[], Sequence[Lease]]

    async def status(self) -> Status:
        """Healthy unless there are others and none of them answers; `detail` says who does."""
        slots = asyncio.Semaphore(AT_A_TIME)
        others = list(self.others())
        answers = await asyncio.gather(*(self._answers(lease, slots) for lease in others))
        healthy = any(answers) or not others
        return Status(
            status=Health.HEALTHY if healthy else Health.UNHEALTHY,
            detail={lease.key: "reachable" if ok else "unreachable" for lease, ok in zip(others, answers, strict=True)},
            version=VERSION,
        )

    async def _answers(self, lease: Lease, slots: asyncio.Semaphore) -> bool:
        url = f"https://{lease.subnet.network_address}:{lease.http_port}"
        async with slots, HttpClient(url, tls=self.identity, server_name=SERVER_NAME, timeout=PING_SECONDS) as http:
            try:
                await http.get("/ping")
            except ApiError:
                return False
            return True
