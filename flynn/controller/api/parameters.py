"""Query parameters and paths that several resources share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeVar

from flynn.http.server import Request
from flynn.identity import access
from flynn.types.codec import convert
from flynn.types.errors import ValidationError

T = TypeVar("T")

INSIDERS_WITH_KEY = access("operator", "host", "app:*", "outside")
"""Who may connect at all. Everybody else comes through the router, which is one of them; the key decides."""

VERBATIM_KEYS = frozenset({"manifest", "config"})  # documents of somebody else's, in which null may mean something
MAX_INTEGER = (1 << 63) - 1


async def body_of(request: Request, type: type[T]) -> T:
    """Return the JSON object in the body as a `type`; null is the same as absent, as clients in Go expect."""
    document = await request.body(dict[str, Any])
    return convert(_without_nulls(document), type)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in VERBATIM_KEYS else _without_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def integer(request: Request, name: str) -> int | None:
    """Return a number from the query, None if it is absent. Raises `ValidationError`."""
    text = request.query(name)
    return whole_number(name, text) if text else None


def whole_number(name: str, text: str) -> int:
    """Return `text` as a number that fits the database. Raises `ValidationError`."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19 or int(digits) > MAX_INTEGER:
        raise ValidationError(name, "must be a number")
    return int(text)


def moment(request: Request, name: str) -> datetime:
    """Return a time from the query; RFC 3339 with up to nine digits of a second. Raises `ValidationError`."""
    text = request.query(name).strip().replace(" ", "+")
    head, dot, tail = text.partition(".")
    if dot:
        digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
        text = f"{head}.{digits[:6].ljust(6, '0')}{tail[len(digits) :]}"
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise ValidationError(name, "must be a time like 2006-01-02T15:04:05.999999999Z") from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
