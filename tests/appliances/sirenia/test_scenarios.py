"""Conversations with the rules, as files: what is true, a line, what one peer decides. `SCENARIOS=write` renews them.

cluster gen=1 init=0/20 primary=n1 sync=n2 async=n3,n4 deposed=n5     the state (also: frozen, singleton)
peers n1 n2 n3        who is registered, in this order              gone n1    awaited n1    established yes
me n2 [singleton]     whose decision is shown
position n2 0/18      how far a held database has come, as it would declare
then write | takeover the decision's state becomes the cluster's
"""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flynn.appliances.sirenia.cluster_state import ClusterState, Freeze
from flynn.appliances.sirenia.evaluate import Cluster, Decision, Me, Misconfigured, evaluate
from flynn.appliances.sirenia.takeover import Refused, declare
from flynn.types.codec import replace
from flynn.types.instance import Instance

NOW = datetime(2026, 1, 2, tzinfo=UTC)
FOLDER = Path(__file__).parent / "scenarios"


def node(name: str, index: int = 0) -> Instance:
    """`n1`, or `n1@7` for the same peer at another address."""
    key, _, at = name.partition("@")
    return replace(Instance.at(f"10.0.0.{at or key[1:]}:5432", "tcp", {"ID": key}), index=index)


def name(instance: Instance | None) -> str:
    if instance is None:
        return "-"
    key, number = instance.meta["ID"], instance.addr.split(":")[0].rpartition(".")[2]
    return key if key[1:] == number else f"{key}@{number}"


def compare(a: str, b: str) -> int:
    first, second = int(a[2:], 16), int(b[2:], 16)
    return (first > second) - (first < second)


def shown(state: ClusterState) -> str:
    words = [f"gen={state.generation}", f"init={state.init_wal}", f"primary={name(state.primary)}"]
    if state.sync is not None:
        words.append(f"sync={name(state.sync)}")
    if state.asyncs:
        words.append("async=" + ",".join(map(name, state.asyncs)))
    if state.deposed:
        words.append("deposed=" + ",".join(map(name, state.deposed)))
    return " ".join(words + ["singleton"] * state.singleton + ["frozen"] * (state.freeze is not None))


class Scenario:
    def __init__(self) -> None:
        self.cluster = Cluster()
        self.positions: dict[str, str] = {}
        self.singleton = False
        self.me = "n1"
        self.last: ClusterState | None = None

    def command(self, line: str) -> None:
        verb, *words = line.split()
        match verb:
            case "cluster":
                self.cluster = Cluster(state=self.state(words)) if words != ["none"] else Cluster()
            case "peers":
                peers = tuple(node(word, number) for number, word in enumerate(words, 1))
                state = self.cluster.state
                leader = next((peer for peer in peers if state and state.primary and peer.id == state.primary.id), None)
                self.set(peers=peers, leader=leader)
            case "gone" | "awaited":
                self.set(**{verb: frozenset(words)})
            case "established":
                self.set(established=words == ["yes"])
            case "me":
                self.me, self.singleton = words[0], "singleton" in words
            case "position":
                self.positions[words[0]] = words[1]
            case "freeze" | "unfreeze":
                assert self.cluster.state is not None
                freeze = Freeze(frozen_at=NOW, reason="maintenance") if verb == "freeze" else None
                self.set(state=replace(self.cluster.state, freeze=freeze))
            case "then":
                assert self.last is not None, "nothing was decided that could be written"
                leader = next((peer for peer in self.cluster.peers if peer.id == self.last.primary.id), None)  # type: ignore[union-attr]
                self.set(state=self.last, leader=leader)
            case _:
                raise ValueError(f"no such command: {line}")

    def set(self, **changes: object) -> None:
        self.cluster = Cluster(**{**{key: getattr(self.cluster, key) for key in Cluster.__slots__}, **changes})  # type: ignore[arg-type]

    def state(self, words: list[str]) -> ClusterState:
        pairs = dict(word.split("=") for word in words if "=" in word)

        def many(key: str) -> list[Instance]:
            return [node(word) for word in pairs.get(key, "").split(",") if word]

        return ClusterState(
            generation=int(pairs["gen"]),
            init_wal=pairs.get("init", "0/0"),
            primary=node(pairs["primary"]),
            sync=node(pairs["sync"]) if "sync" in pairs else None,
            asyncs=many("async"),
            deposed=many("deposed"),
            singleton="singleton" in words,
            freeze=Freeze(frozen_at=NOW, reason="maintenance") if "frozen" in words else None,
        )

    def outcome(self) -> list[str]:
        me = Me(node(self.me), "ID", self.singleton)
        self.last = None
        try:
            decision = evaluate(me, self.cluster, "0/0", NOW)
        except Misconfigured as error:
            return [f"{self.me} gives up: {error}"]
        lines = [f"{self.me} is {decision.role}{self.neighbours(decision)}: {decision.reason}"]
        if decision.write is not None:
            self.last = decision.write
            lines.append(f"{self.me} writes {shown(decision.write)}")
        if decision.takeover is not None:
            position = self.positions.get(me.id, "0/0")
            result = declare(decision.takeover, position, position, compare)
            if isinstance(result, Refused):
                lines.append(f"{self.me} refuses: {result.reason}")
            else:
                self.last = result
                lines.append(f"{self.me} declares {shown(result)}")
        return lines

    def neighbours(self, decision: Decision) -> str:
        up = f" up={name(decision.upstream)}" if decision.upstream else ""
        return up + (f" down={name(decision.downstream)}" if decision.downstream else "")


def play(text: str) -> str:
    scenario, out = Scenario(), []
    for block in re.split(r"\n{2,}", text.strip()):
        commands, _, _ = block.partition("\n----")
        for line in commands.splitlines():
            if not line.startswith("#"):
                scenario.command(line)
        out.append("\n".join([commands, "----", *scenario.outcome()]) if "\n----" in block else block)
    return "\n\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text()
    actual = play(expected)
    if os.environ.get("SCENARIOS") == "write":
        path.write_text(actual)
    else:
        assert actual == expected
