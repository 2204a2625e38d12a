"""What a peer can ask another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flynn.appliances.sirenia.cluster_state import Role
from flynn.appliances.sirenia.suspicion import Answer
from flynn.types.instance import Instance


@dataclass(frozen=True, slots=True)
class Heard:
    answer: Answer
    id: str = ""  # its logical identity
    role: Role = Role.UNKNOWN
    generation: int = 0  # of the state it knows
    lineage: int = 0  # the generation its data belong to
    timeline: int = 0


class Neighbours(Protocol):
    async def ask(self, instance: Instance) -> Heard:
        """Within about a second; never fails."""


class Hermit:
    """For clusters of one: there is nobody."""

    async def ask(self, instance: Instance) -> Heard:
        return Heard(Answer.SILENT)
