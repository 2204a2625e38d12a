"""Tables, ages and JSON on standard output. Pure, apart from `emit`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import click

from flynn.types.codec import encode_indented

REDACTED = "XXXREDACTEDXXX"  # stands where a secret was


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns with two spaces between them; the last one is not padded."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def age(then: datetime, now: datetime) -> str:
    """Say how long ago something was, the way the original does."""
    seconds = (now - then).total_seconds()
    minutes, hours = seconds / 60, seconds / 3600
    days = hours / 24
    if seconds < 1:
        return "Less than a second ago"
    if minutes < 1:
        return f"{int(seconds)} seconds ago"
    if minutes < 2:
        return "About a minute ago"
    if hours < 1:
        return f"{int(minutes)} minutes ago"
    if hours < 2:
        return "About an hour ago"
    if hours < 48:
        return f"{int(hours)} hours ago"
    if days < 14:
        return f"{int(days)} days ago"
    if days < 90:
        return f"{int(days / 7)} weeks ago"
    if days < 730:
        return f"{int(days / 30)} months ago"
    return f"{int(days / 365)} years ago"


def emit(rows: Sequence[Sequence[str]], value: object, as_json: bool) -> None:
    """Print a table, or the value it was made of as JSON."""
    if as_json:
        click.echo(encode_indented(value).decode(), nl=False)
    else:
        click.echo(table(rows))
