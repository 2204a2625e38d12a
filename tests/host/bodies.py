"""Request bodies made from the shapes of the wire types: right ones, and right ones with something wrong in them."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from typing import Any

import msgspec
from hypothesis import strategies as st

HUGE = 1 << 200
ODD_TEXTS = (
    "", " ", ".", "..", "../../etc/passwd", "/", "a/b", "-", "-rf", "a\0b", "\n", "\r\nX-Evil: 1", "%00", "%2e%2e%2f",
    "x" * 300, "ü", "\u202e", "\U0001f4a3", "\ufeff", "true", "0", "null", "{{.}}", "${HOME}", "'; --", "a@b", "*",
    "100.102.7.1/24", "::1", "127.0.0.1:1", "http://127.0.0.1:1/x", "syslog://127.0.0.1:1", "syslog://[::1", "none",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, -1, 2, 80, 65535, 65536, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32, 1 << 63, (1 << 63) - 1, -(1 << 63),
    1 << 64, HUGE, -HUGE, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
WRONG = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS),
    st.just([]), st.just({}), st.just([[]]), st.just({"": None}), st.just([None]), st.just({"a": {"b": []}}),
)  # fmt: skip

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=20))
numbers = st.one_of(st.sampled_from([n for n in ODD_NUMBERS if isinstance(n, int)]), st.integers(-5, 70000))


def shaped(kind: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that decode as `kind`, apart from numbers that no range takes."""
    return _of(msgspec.inspect.type_info(kind), depth)


def _of(info: msgspec.inspect.Type, depth: int) -> st.SearchStrategy[Any]:
    match info:
        case msgspec.inspect.StructType(fields=fields):
            required = {f.encode_name: _of(f.type, depth + 1) for f in fields if f.required}
            optional = {f.encode_name: _of(f.type, depth + 1) for f in fields if not f.required}
            return st.fixed_dictionaries(required, optional=optional)
        case msgspec.inspect.DictType(value_type=value):
            return st.dictionaries(texts, _of(value, depth + 1), max_size=3)
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(_of(item, depth + 1), max_size=2)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([_of(one, depth) for one in types])
        case msgspec.inspect.StrType():
            return texts
        case msgspec.inspect.IntType():
            return numbers
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.FloatType():
            return st.floats()
        case msgspec.inspect.DateTimeType():
            return st.datetimes(datetime(1, 1, 1), datetime(9999, 1, 1)).map(lambda d: d.isoformat() + "Z")
        case msgspec.inspect.EnumType(cls=cls):
            return st.sampled_from([member.value for member in cls])
        case msgspec.inspect.AnyType():
            return WRONG
    raise NotImplementedError(info)


@st.composite
def spoiled(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Any:
    """One of `values` with something in it replaced by what should not be there."""
    value = copy.deepcopy(draw(values))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, child in items:
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    if isinstance(value, dict | list):
        walk(value)
    if not places:
        return draw(WRONG)
    node, key = draw(st.sampled_from(places))
    node[key] = copy.deepcopy(draw(WRONG))
    return value


def written(value: Any) -> bytes:
    """As JSON; NaN and lone surrogates come out as no parser should take them."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def raw_bodies(draw: st.DrawFn, kind: Any) -> bytes:
    """Bytes for an endpoint that takes `kind` (None: no body): mostly JSON of about that shape, sometimes no JSON."""
    if kind is None:
        return draw(st.sampled_from([b"", b"{}", b"null", b"x", b"\xff\xfe"]))
    text = written(draw(st.one_of(shaped(kind), spoiled(shaped(kind)), spoiled(shaped(kind)), WRONG)))
    match draw(st.integers(0, 11)):
        case 0:
            return text[: draw(st.integers(0, len(text)))]
        case 1:
            return b"\xef\xbb\xbf" + text
        case 2:
            return text + draw(st.sampled_from([b" ", b"\0", b"{}", b"]", b"\xff"]))
        case 3:
            return draw(st.sampled_from([b"", b" ", b"\0", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b'"\\ud800"']))
    return text
