"""How things look: tables, ages, durations, sizes. Pure; the shapes are contract (spec/cli section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

PADDING = 2
SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
ZERO_YEAR = 1


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows with elastic tab stops: a cell is as wide as the widest of the neighbouring lines that go on after it."""
    lines = [list(row) for row in rows]
    widths = [[0] * len(line) for line in lines]
    for column in range(max(map(len, lines), default=0)):
        block: list[int] = []  # neighbouring lines that go on after this column
        for index in range(len(lines) + 1):
            if index < len(lines) and len(lines[index]) > column + 1:
                block.append(index)
                continue
            width = max((len(lines[i][column]) for i in block), default=0) + PADDING
            for i in block:
                widths[i][column] = width
            block = []
    return "".join(
        "".join([*(cell.ljust(width) for cell, width in zip(line[:-1], padding, strict=False)), *line[-1:]]) + "\n"
        for line, padding in zip(lines, widths, strict=True)
    )


def age(moment: datetime | None, now: datetime) -> str:
    """`3 minutes ago`; nothing for a missing time."""
    if moment is None or moment.year == ZERO_YEAR:
        return ""
    return human(now - moment) + " ago"


def human(duration: timedelta) -> str:
    seconds = int(duration.total_seconds())
    minutes, hours = seconds // 60, seconds // 3600
    days = hours // 24
    if seconds < 1:
        return "Less than a second"
    if seconds < 60:
        return f"{seconds} seconds"
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if days < 14:
        return f"{days} days"
    if days < 90:
        return f"{days // 7} weeks"
    if days < 730:
        return f"{days // 30} months"
    return f"{days // 365} years"


def duration(seconds: float) -> str:
    """As Go prints a duration: `304.379602ms`, `3.944629056s`, `2m0s`."""
    nanoseconds = round(seconds * 1e9)
    if nanoseconds < 1_000_000_000:
        for unit, scale in (("ms", 1_000_000), ("µs", 1_000)):
            if nanoseconds >= scale:
                return f"{_decimal(nanoseconds, scale)}{unit}"
        return f"{nanoseconds}ns" if nanoseconds else "0s"
    minutes, rest = divmod(nanoseconds, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{_decimal(rest, 1_000_000_000)}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def _decimal(value: int, scale: int) -> str:
    whole, fraction = divmod(value, scale)
    digits = str(fraction).zfill(len(str(scale)) - 1).rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def moment(value: datetime | None) -> str:
    """`2020-01-02 03:04:05.123456 +0000 UTC`, as Go prints a time; `<nil>` for a missing one."""
    if value is None:
        return "<nil>"
    value = value.astimezone(UTC)
    fraction = f".{value.microsecond:06d}".rstrip("0") if value.microsecond else ""
    return f"{value:%Y-%m-%d %H:%M:%S}{fraction} +0000 UTC"


def size(count: float) -> str:
    """Bytes with four significant digits at most: `100MB`, `1.5GB`."""
    for unit in SIZE_UNITS:
        if count < 1024 or unit == SIZE_UNITS[-1]:
            return f"{count:.4g}{unit}"
        count /= 1024
    raise AssertionError("the last unit takes everything")


def log_time(stamp: str) -> str:
    """A log line's time with exactly six digits of a second, in its own zone."""
    body, zone = (stamp[:-1], "Z") if stamp.endswith("Z") else (stamp[:-6], stamp[-6:])
    whole, _, fraction = body.partition(".")
    return f"{whole}.{fraction[:6].ljust(6, '0')}{zone}"
