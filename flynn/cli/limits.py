"""Resource limits as users write and read them: `memory=512MB`, `max_fd=12k`. See spec/cli section 6.7. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flynn.cli.errors import CliError
from flynn.cli.output import size
from flynn.types.resources import DEFAULTS, Limit, Resources

IN_BYTES = ("memory", "temp_disk")
SETTABLE = ("memory", "cpu", "temp_disk", "max_fd")
VALUE = re.compile(r"^(\d+(?:\.\d+)*) ?([kKmMgGtTpP]?)[bB]?$")
UNITS = "kmgtp"


def parse(words: Sequence[str]) -> Resources:
    """Each `NAME=VALUE` as a limit without a request, which the server fills in."""
    parsed: Resources = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise CliError(f'invalid resource limit: "{word}"')
        if name not in SETTABLE:
            raise CliError(f'invalid resource limit type: ["{name}" "{value}"]')
        parsed[name] = Limit(limit=amount(name, value))
    return parsed


def amount(name: str, value: str) -> int:
    found = VALUE.match(value)
    try:
        number = float(found[1]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        raise CliError(f'invalid resource limit value: "{value}"')
    base = 1024 if name in IN_BYTES else 1000
    return int(number * base ** (UNITS.index(found[2].lower()) + 1 if found[2] else 0))


def of_job(words: Sequence[str]) -> Resources:
    """The limits of a one-off job: the defaults with those given on top."""
    return {**DEFAULTS, **parse(words)}


def shown(name: str, limit: Limit) -> str:
    value = limit.limit if limit.limit is not None else 0
    return f"{name}={size(value) if name in IN_BYTES else value}"
