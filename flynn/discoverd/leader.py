"""Who leads a service: the two rules of the directory, as functions over the instances of one service."""

from __future__ import annotations

from collections.abc import Mapping

from flynn.types.instance import Instance, LeaderType


def leader_of(leader_type: str, chosen: str, instances: Mapping[str, Instance]) -> Instance | None:
    """The instance that leads, or None.

    `chosen` is the id somebody named. In a manual service only that one can lead, and only while it is there: the id
    survives the absence of its instance. In every other service it wins until the next change of membership (which
    clears it), and without it the instance registered first leads. `instances` are in the order of their registration,
    as a dictionary is that grows at its end.
    """
    if chosen in instances:
        return instances[chosen]
    if leader_type == LeaderType.MANUAL:
        return None
    return next(iter(instances.values()), None)


def chosen_after_change(leader_type: str, chosen: str) -> str:
    """What remains of an explicit choice when instances came or went: manual services keep it, others do not."""
    return chosen if leader_type == LeaderType.MANUAL else ""
