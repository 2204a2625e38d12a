"""The shipped manifest, and the choice and resumption of steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flynn.bootstrap.actions import ACTIONS
from flynn.bootstrap.certificates import pin_of, site_certificate
from flynn.bootstrap.main import run_steps
from flynn.bootstrap.manifest import ManifestError, Step, capped, choose, parse, shipped
from flynn.bootstrap.record import Record
from flynn.types.artifact import Artifact

IMAGES = ("discoverd", "flannel", "postgres", "controller", "slugbuilder", "slugrunner", "blobstore", "router")
IMAGES += ("gitreceive", "logaggregator", "status")


def the_manifest() -> list[Step]:
    return parse(shipped(), {name: Artifact(type="flynn", uri=name) for name in IMAGES}, tuple(ACTIONS))


def test_every_step_of_the_shipped_manifest_is_understood() -> None:
    steps = the_manifest()
    assert steps[0].id == "require-env"
    assert steps[-1].id == "log-complete"


def test_steps_refer_only_to_steps_before_them() -> None:
    seen: set[str] = set()
    for step in the_manifest():
        assert {step.app_step, step.from_step, step.cert_step} - {""} <= seen
        seen.add(step.id)


def test_an_image_that_was_not_built_is_named() -> None:
    with pytest.raises(ManifestError, match="discoverd"):
        parse(shipped(), {}, tuple(ACTIONS))


def test_an_unknown_action_is_refused_before_anything_runs() -> None:
    with pytest.raises(ManifestError, match="unknown action"):
        parse(b'[{"id": "x", "action": "explode"}]', {}, tuple(ACTIONS))


def test_steps_can_be_chosen_by_name() -> None:
    assert [s.id for s in choose(the_manifest(), ["wait-hosts", "discoverd"])] == ["discoverd", "wait-hosts"]
    with pytest.raises(ManifestError, match="nosuch"):
        choose(the_manifest(), ["nosuch"])


def test_a_cluster_of_one_runs_nothing_twice() -> None:
    assert capped({"web": 2, "postgres": 3, "none": 0}, singleton=True) == {"web": 1, "postgres": 1, "none": 0}
    assert capped({"web": 2}, singleton=False) == {"web": 2}


def test_the_pin_covers_the_whole_leaf() -> None:
    certificate = site_certificate(["example.com", "*.example.com"])
    assert certificate["pin"] == pin_of(certificate["cert"])
    assert certificate["pin"] != site_certificate(["example.com"])["pin"]


class Journal:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, step: Step) -> None:
        self.lines.append(f"start {step.id}")

    def done(self, step: Step, data: Mapping[str, Any], *, again: bool) -> None:
        self.lines.append(f"{'again' if again else 'done'} {step.id}")

    def failed(self, step: Step, reason: str) -> None:
        self.lines.append(f"failed {step.id}: {reason}")


class Fragile:
    """Actions of which one fails the first time."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.broken = True
        self.ids: list[str] = []

    def restore(self, step: Step, data: Mapping[str, Any]) -> None: ...

    async def perform(self, step: Step) -> dict[str, Any]:
        intent = self.record.intend(step.id, {"id": f"{step.id}-{len(self.ids)}"})
        self.ids.append(intent["id"])
        if step.id == "two" and self.broken:
            raise OSError("no route to host")
        return {"id": intent["id"]}


async def test_an_interrupted_run_is_resumed_with_the_ids_it_had_chosen(tmp_path: Path) -> None:
    steps = [Step(id=name, action="wait") for name in ("one", "two", "three")]
    journal = Journal()
    fragile = Fragile(Record(tmp_path / "record.json"))
    assert not await run_steps(steps, fragile, fragile.record, journal)  # type: ignore[arg-type]  # the part in use
    resumed = Fragile(Record(tmp_path / "record.json"))
    resumed.broken = False
    assert await run_steps(steps, resumed, resumed.record, journal)  # type: ignore[arg-type]
    assert journal.lines == [
        "start one", "done one", "start two", "failed two: no route to host",
        "again one", "start two", "done two", "start three", "done three",
    ]  # fmt: skip
    assert resumed.ids[0] == fragile.ids[1] == "two-1"
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o600
