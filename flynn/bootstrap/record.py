"""What a bootstrap has done so far, on disk, so that an interrupted run is resumed and not begun anew.

A step first writes what it intends (the ids it will use), acts, and then marks itself done. Running a step again with
the same intention finds what is already there. The file holds secrets: mode 0600.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flynn.identity.authority import write_private
from flynn.types.codec import Wire, always, decode, encode


class StepRecord(Wire):
    done: bool = always(False)
    intent: dict[str, Any] = always({})
    data: dict[str, Any] = always({})


class Record:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: dict[str, StepRecord] = decode(path.read_bytes(), dict[str, StepRecord]) if path.exists() else {}

    def done(self, step: str) -> bool:
        return step in self.steps and self.steps[step].done

    def data(self) -> dict[str, dict[str, Any]]:
        return {name: record.data for name, record in self.steps.items() if record.done}

    def intend(self, step: str, intent: dict[str, Any]) -> dict[str, Any]:
        """What this step set out to do the first time; `intent` if this is the first time."""
        if step not in self.steps:
            self.steps[step] = StepRecord(intent=intent)
            self.save()
        return self.steps[step].intent

    def finish(self, step: str, data: dict[str, Any]) -> None:
        intent = self.steps[step].intent if step in self.steps else {}
        self.steps[step] = StepRecord(done=True, intent=intent, data=data)
        self.save()

    def save(self) -> None:
        """Write the record, with what was changed in an intention meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_private(self._path, encode(self.steps))
