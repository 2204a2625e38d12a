"""Process types: what a Procfile declares and what a buildpack's `bin/release` suggests.

A Procfile has one `<type>: <command>` per line; the command is everything after the first colon and goes to the shell
as it is. The original parses it as YAML, so that `web: foo: bar` or a tab breaks it; reading lines takes every Procfile
that works there, and those too. A command wrapped in one pair of quotes loses them, as YAML users expect.

A release is the little YAML that the buildpack API documents: a mapping with `config_vars` and `default_process_types`,
both mappings of plain or quoted words. That much is parsed here; flow mappings are taken when they are JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

TYPE_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Malformed(Exception):
    """A Procfile or release cannot be understood; the text says where."""


@dataclass(frozen=True, slots=True)
class Release:
    """What `bin/release` printed, as far as it concerns us."""

    config_vars: Mapping[str, str] = field(default_factory=dict)
    default_process_types: Mapping[str, str] = field(default_factory=dict)


def parse_procfile(text: str) -> dict[str, str]:
    """Return the commands by type, in the order of the file.

    Raises:
        Malformed: names the first line that is no declaration.
    """
    commands: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#") or line == "---":
            continue
        name, colon, command = line.partition(":")
        name, command = name.strip().strip("\"'"), _unquoted(command.strip())
        if not colon or not TYPE_NAME.fullmatch(name):
            raise Malformed(f"Procfile line {number} is not '<type>: <command>': {line}")
        if not command:
            raise Malformed(f"Procfile line {number} gives '{name}' no command")
        commands[name] = command
    return commands


def parse_release(text: str) -> Release:
    """Return what a `bin/release` printed; an empty one says nothing.

    Raises:
        Malformed: one of the two mappings we need is not a mapping of words.
    """
    sections: dict[str, dict[str, str]] = {"config_vars": {}, "default_process_types": {}}
    current: str | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped == "---" or stripped.startswith("#"):
            continue
        key, colon, value = stripped.partition(":")
        key, value = _word(key), value.strip()
        if not line[0].isspace():
            current = key if key in sections else None
            if current and value:
                sections[current] = _flow_mapping(current, value)
        elif current is not None:
            if not colon:
                raise Malformed(f"'{stripped}' under {current} is not '<name>: <value>'")
            sections[current][key] = _word(value)
    return Release(sections["config_vars"], sections["default_process_types"])


def process_commands(procfile: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """Return the command of every type, sorted by type: a Procfile outranks a buildpack's suggestion."""
    return dict(sorted({**defaults, **procfile}.items()))


def _flow_mapping(section: str, value: str) -> dict[str, str]:
    try:
        mapping = json.loads(value)
    except ValueError:
        mapping = None
    if mapping is None and value in ("null", "~"):
        mapping = {}
    if not isinstance(mapping, dict):
        raise Malformed(f"{section} is not a mapping: {value}")
    return {str(key): str(item) for key, item in mapping.items()}


def _word(text: str) -> str:
    """A YAML scalar on one line: plain, or quoted either way."""
    text = text.strip()
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        try:
            return str(json.loads(text))
        except ValueError:
            return text[1:-1]
    if text.startswith("'") and text.endswith("'") and len(text) > 1:
        return text[1:-1].replace("''", "'")
    return re.split(r"\s#", text, maxsplit=1)[0].rstrip()


def _unquoted(command: str) -> str:
    for quote in "\"'":
        if len(command) > 1 and command[0] == command[-1] == quote and quote not in command[1:-1]:
            return command[1:-1]
    return command
