"""Identifiers: lower-case v4 UUIDs, and what counts as one in a path."""

from __future__ import annotations

import re
from uuid import UUID, uuid4

from flynn.types.errors import NotFound, ValidationError

_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE)


def new_id() -> str:
    """Return a fresh id."""
    return str(uuid4())


def is_uuid(text: str) -> bool:
    """Tell whether PostgreSQL would take `text` for a UUID, with or without dashes."""
    return _UUID.fullmatch(text) is not None


def sought(kind: str, text: str) -> str:
    """Return `text` in its usual form if it can be an id; a malformed one names nothing. Raises `NotFound`."""
    if not is_uuid(text):
        raise NotFound(f"{kind} {text!r} not found")
    return str(UUID(text))


def given(field: str, text: str) -> str:
    """Return `text`, a UUID in a body, in its usual form. Raises `ValidationError`."""
    if not is_uuid(text):
        raise ValidationError(field, "must be a UUID")
    return str(UUID(text))
