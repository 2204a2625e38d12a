"""Resource limits as users write and read them: `memory=512MB`, `max_fd=12k`. See spec/cli section 6.7. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flynn.cli.errors import CliError
from flynn.cli.output import size
from flynn.types.resources import DEFAULTS, IN_BYTES, BadLimit, Limit, Resources, parse_amount, parse_limits


def parse(words: Sequence[str]) -> Resources:
    """Each `NAME=VALUE` as a limit without a request, which the server fills in."""
    try:
        return parse_limits(words)
    except BadLimit as error:
        raise CliError(str(error)) from error


def amount(name: str, value: str) -> int:
    try:
        return parse_amount(name, value)
    except BadLimit as error:
        raise CliError(str(error)) from error


def of_job(words: Sequence[str]) -> Resources:
    """The limits of a one-off job: the defaults with those given on top."""
    return {**DEFAULTS, **parse(words)}


def shown(name: str, limit: Limit) -> str:
    value = limit.limit if limit.limit is not None else 0
    return f"{name}={size(value) if name in IN_BYTES else value}"
