"""JSON at the edge: the one place that knows the wire rules of the original.

The original is written in Go, and its JSON conventions are contract: keys that are left out when empty, keys that are
always written, the zero time, durations as integer nanoseconds. A wire type is a `Wire` struct; the rule of a key
follows from its default:

    name: str = ""                      left out when empty (Go's omitempty)
    exit_status: int | None = None      left out when null
    index: int = always(0)              written even when it is zero
    created_at: datetime = zero_time()  written as 0001-01-01T00:00:00Z while unset
    state: State                        required on input, always written

Unknown keys are ignored on input, as old clients and servers expect of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NewType, TypeVar, cast, dataclass_transform

import msgspec

from flynn.types.errors import BadSyntax, ValidationError

T = TypeVar("T")
W = TypeVar("W", bound="Wire")

Json = Any
"""Any JSON document, decoded: None, bool, int, float, str, list or dict with string keys."""

Nanoseconds = NewType("Nanoseconds", int)
"""A duration as Go writes it."""

ZERO_TIME = datetime(1, 1, 1, tzinfo=UTC)
"""What an unset time looks like on the wire."""


if TYPE_CHECKING:
    # mypy does not hand the class keywords of a struct on to its subclasses, so it is told what they mean.
    @dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
    class Wire:
        """A record that crosses the wire. Immutable; `replace` makes changed copies."""

        __struct_fields__: tuple[str, ...]
else:

    class _KeywordOnly(type(msgspec.Struct)):
        """msgspec does not hand `kw_only` on to subclasses; required fields may follow optional ones in ours."""

        def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> type:
            return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **options})

    class Wire(msgspec.Struct, metaclass=_KeywordOnly, frozen=True, omit_defaults=True):
        """A record that crosses the wire. Immutable; `replace` makes changed copies."""


def replace(value: W, **changes: Any) -> W:
    """A copy of `value` with some fields changed."""
    return cast(W, msgspec.structs.replace(cast(Any, value), **changes))


def always(value: T) -> T:
    """A default that is written like any other value: for keys that must be present even when they are empty."""
    return msgspec.field(default_factory=_returning(value))


def zero_time() -> datetime:
    """The default of a time that is always present on the wire."""
    return always(ZERO_TIME)


def _returning(value: T) -> Callable[[], T]:
    if isinstance(value, list | dict | set):
        # msgspec leaves out the empty value of a bare `list`, `dict` or `set` factory, but not of a function.
        return lambda: cast(T, value.copy())
    return lambda: value


def nanoseconds(duration: timedelta) -> Nanoseconds:
    return Nanoseconds(round(duration.total_seconds() * 1_000_000) * 1000)


def as_timedelta(duration: int) -> timedelta:
    return timedelta(microseconds=duration / 1000)


_encoder = msgspec.json.Encoder()
_sorting_encoder = msgspec.json.Encoder(order="sorted")
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def encode(value: object) -> bytes:
    """Compact JSON without a trailing newline."""
    return _encoder.encode(value)


def encode_indented(value: object) -> bytes:
    """JSON for people and for the status documents: two blanks of indentation and a final newline."""
    return msgspec.json.format(encode(value), indent=2) + b"\n"


def decode(raw: bytes | bytearray | memoryview | str, type: type[T]) -> T:
    """Decode `raw` into `type`.

    Raises:
        BadSyntax: not JSON at all.
        ValidationError: JSON of another shape; `detail.field` names the offending key.
    """
    decoder = _decoders.get(type)
    if decoder is None:
        decoder = _decoders[type] = msgspec.json.Decoder(type)
    try:
        return cast(T, decoder.decode(raw))
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSyntax("The provided JSON input is invalid") from error


def decode_first(raw: bytes, type: type[T]) -> T:
    """Like `decode`, but ignores what follows the first JSON value, as Go's streaming decoder does."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        return decode(raw, type)
    except BadSyntax:
        import json  # Only for this odd case: the standard decoder can tell where the first value ends.

        try:
            _, end = json.JSONDecoder().raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            raise BadSyntax("The provided JSON input is invalid") from None
        return decode(text.lstrip()[:end].encode("utf-8", "surrogateescape"), type)


def convert(value: Json, type: type[T]) -> T:
    """Turn plain data (as from a database or YAML) into `type`; raises ValidationError like `decode`."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error


def builtins(value: object) -> Json:
    """Turn a wire value into plain dicts and lists, with the omission rules applied."""
    return msgspec.to_builtins(value)


def _validation_error(text: str) -> ValidationError:
    message, _, path = text.partition(" - at `")
    field = path.rstrip("`").removeprefix("$").lstrip(".")
    if not field and "missing required field `" in message:
        field = message.split("`")[1]
        message = "must be set"
    if not field and "contains unknown field `" in message:
        field = message.split("`")[1]
        message = "is not a known field"
    return ValidationError(field, message[:1].lower() + message[1:] if field else message)


def canonical(value: object) -> bytes:
    """The canonical JSON that image and layer ids are computed over.

    Keys sorted bytewise, no white space, UTF-8 raw, and in strings only the quote and the backslash escaped; numbers
    are integers. Control characters have no strict JSON form under these rules, so they are refused.
    """
    return _canonical(msgspec.to_builtins(value)).encode()


def _canonical(value: Json) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            if any(character < " " for character in value):
                raise ValueError(f"a control character cannot stand in canonical JSON: {value!r}")
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case list() | tuple():
            return "[" + ",".join(_canonical(item) for item in value) + "]"
        case dict():
            keys = sorted(value, key=lambda key: key.encode())
            return "{" + ",".join(f"{_canonical(key)}:{_canonical(value[key])}" for key in keys) + "}"
    raise TypeError(f"{type(value).__name__} has no canonical JSON")


def sha512_256(data: bytes) -> str:
    """Hex SHA-512/256, the hash that names images and layers."""
    digest = hashlib.new("sha512_256")
    digest.update(data)
    return digest.hexdigest()
