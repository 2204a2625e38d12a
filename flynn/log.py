"""Logging of every daemon: events with fields, one logfmt line each, on standard output.

log = logging.getLogger(__name__)
log.info("job placed", extra={"job": job.id, "host": host.id})
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Logfmt(logging.Formatter):
    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {
            "t": stamp,
            "lvl": record.levelname.lower(),
            "component": self.component,
            "at": record.name.removeprefix("flynn."),
            "msg": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        line = " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(character in ' "=\n\t' for character in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def configure(component: str) -> None:
    """Send this process's log to standard output; `DEBUG` in the environment asks for more."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Logfmt(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("flynn").setLevel(logging.DEBUG if os.environ.get("DEBUG") else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.captureWarnings(True)
