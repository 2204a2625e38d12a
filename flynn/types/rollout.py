"""How a release of discoverd goes from node to node: the metadata of the service `discoverd` while it is deployed.

    {"id": "<deployment>", "release": "<release>", "states": {"10.0.0.1:1111": "performing" | "done"}}

The worker of the controller writes it anew for each deployment; each new process marks its own address. At most one
address is `performing`. `release` is ours: it says who is to take over from whom. spec/discoverd section 10.
"""

from __future__ import annotations

from enum import StrEnum

from flynn.types.codec import Wire, always, replace


class RolloutState(StrEnum):
    PERFORMING = "performing"
    DONE = "done"


class Rollout(Wire):
    id: str
    release: str = ""
    states: dict[str, RolloutState] = always({})

    def performed_by(self, address: str) -> Rollout | None:
        """With `address` as the one that is performing; None while another one is. Its own old mark does no harm."""
        others = (state for other, state in self.states.items() if other != address)
        if RolloutState.PERFORMING in others:
            return None
        return replace(self, states={**self.states, address: RolloutState.PERFORMING})

    def done_by(self, address: str) -> Rollout:
        return replace(self, states={**self.states, address: RolloutState.DONE})

    def wants(self, release: str, instead_of: str) -> bool:
        """Whether a process of `release` is to take over from one of the release `instead_of`."""
        return bool(release) and release == self.release and release != instead_of
