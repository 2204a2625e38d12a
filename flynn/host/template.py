"""Go's text templates, as far as `flynn-host ps -f` and the templates of log sinks need them. Pure.

Known: text, `{{.Field.Of.Record}}`, `{{index .Metadata "key"}}`, quoted strings and numbers, pipelines, variables,
`if`, `else`, `range`, `with`, `end`, comments, `{{-` and `-}}`, and the functions in `FUNCTIONS`. Not known: `define`,
`template`, `block`, `break`, methods. Fields have the names of the original's Go types (`.Config.Env`, `.HostID`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

import msgspec

from flynn.types.codec import encode

Function = Callable[..., Any]

_ACTION = re.compile(
    r"\{\{(?P<left>- )?(?:\s*/\*(?P<comment>.*?)\*/\s*|(?P<action>.*?))(?P<right>(?<=\s)-)?\}\}", re.DOTALL
)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)|(?P<variable>\$\w*)"""
    r"""|(?P<field>\.\w+)|(?P<dot>\.)|(?P<word>\w+)|(?P<sign>:=|=|\||\(|\)|,))"""
)
MAX_OUTPUT = 1 << 20  # characters; a template cannot be made to fill the memory
ALIASES = {"volumeid": "volume"}  # fields that have another name in Go than on the wire


class TemplateError(ValueError):
    """The template cannot be read, or does not fit the record it is applied to."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


@dataclass(slots=True)
class _Block:
    """`if`, `range`, `with`: a pipeline, what follows it, and what follows `else`."""

    kind: str
    pipeline: _Pipeline
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] | None = None


@dataclass(frozen=True, slots=True)
class _Path:
    """Fields of something: of the dot, of a variable, of what stands in parentheses."""

    start: Any  # ".", "$name" or a pipeline
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """A function, or a value standing alone, with arguments."""

    first: Any  # a function's name, or an operand
    function: bool
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Literal:
    value: Any


@dataclass(frozen=True, slots=True)
class _Pipeline:
    variables: tuple[str, ...]
    calls: tuple[_Call, ...]


_Node = str | _Pipeline | _Block


class Template:
    """A template that has been read. `render` applies it to a record."""

    def __init__(self, text: str, functions: Sequence[str] = ()) -> None:
        """`functions`: names that `render` will be given, besides `FUNCTIONS`. Raises `TemplateError`."""
        self._names = {*FUNCTIONS, *functions}
        self._nodes = self._parse(text)

    def render(self, record: Any, functions: Mapping[str, Function] | None = None) -> str:
        """Raises `TemplateError`."""
        rendering = _Rendering({**FUNCTIONS, **(functions or {})}, record)
        rendering.nodes(self._nodes, record)
        return "".join(rendering.output)

    # Reading

    def _parse(self, text: str) -> list[_Node]:
        root: list[_Node] = []
        current, stack = root, list[tuple[_Block, list[_Node], bool]]()
        position, trim = 0, False
        for found in _ACTION.finditer(text):
            piece = text[position : found.start()]
            piece = piece.lstrip() if trim else piece
            piece = piece.rstrip() if found["left"] else piece
            if piece:
                current.append(piece)
            position, trim = found.end(), found["right"] is not None
            if found["comment"] is not None:
                continue
            tokens = _tokens(found["action"])
            word = tokens[0].text if tokens and tokens[0].kind == "word" else ""
            if word in ("if", "range", "with"):
                block = _Block(word, self._pipeline(tokens[1:]))
                current.append(block)
                stack.append((block, current, False))
                current = block.body
            elif word == "else":
                if not stack or stack[-1][0].otherwise is not None:
                    raise TemplateError("unexpected {{else}}")
                block = stack[-1][0]
                current = block.otherwise = []
                if len(tokens) > 1 and tokens[1].text in ("if", "with"):
                    inner = _Block(tokens[1].text, self._pipeline(tokens[2:]))
                    current.append(inner)
                    stack.append((inner, current, True))
                    current = inner.body
                elif len(tokens) > 1:
                    raise TemplateError(f"unexpected {tokens[1].text!r} behind else")
            elif word == "end":
                if not stack or len(tokens) > 1:
                    raise TemplateError("unexpected {{end}}")
                while stack:
                    _, current, chained = stack.pop()
                    if not chained:
                        break
            else:
                current.append(self._pipeline(tokens))
        rest = text[position:]
        if stack or "{{" in rest:
            raise TemplateError("unexpected end of the template")
        current.append(rest.lstrip() if trim else rest)
        return root

    def _pipeline(self, tokens: list[_Token]) -> _Pipeline:
        variables: list[str] = []
        signs = [token.text for token in tokens]
        for sign in (":=", "="):
            if sign in signs:
                at = signs.index(sign)
                variables = [token.text for token in tokens[:at] if token.kind == "variable"]
                if not variables or len(variables) > 2:
                    raise TemplateError(f"unexpected {sign!r}")
                tokens = tokens[at + 1 :]
                break
        calls: list[_Call] = []
        rest = tokens
        while rest or not calls:
            call, rest = self._call(rest)
            calls.append(call)
            if rest:
                if rest[0].text != "|":
                    raise TemplateError(f"unexpected {rest[0].text!r}")
                rest = rest[1:]
                if not rest:
                    raise TemplateError("nothing behind |")
        return _Pipeline(tuple(variables), tuple(calls))

    def _call(self, tokens: list[_Token]) -> tuple[_Call, list[_Token]]:
        operands: list[Any] = []
        name = ""
        rest = tokens
        while rest and rest[0].text not in ("|", ")"):
            if not operands and not name and rest[0].kind == "word" and rest[0].text not in _CONSTANTS:
                name, rest = rest[0].text, rest[1:]
                if name not in self._names:
                    raise TemplateError(f'function "{name}" not defined')
                continue
            operand, rest = self._operand(rest)
            operands.append(operand)
        if name:
            return _Call(name, True, tuple(operands)), rest
        if not operands:
            raise TemplateError("missing value for command")
        return _Call(operands[0], False, tuple(operands[1:])), rest

    def _operand(self, tokens: list[_Token]) -> tuple[Any, list[_Token]]:
        token, rest = tokens[0], tokens[1:]
        start: Any
        match token.kind:
            case "string":
                return _Literal(_unquoted(token.text)), rest
            case "number":
                return _Literal(float(token.text) if "." in token.text else int(token.text)), rest
            case "word" if token.text in _CONSTANTS:
                return _Literal(_CONSTANTS[token.text]), rest
            case "dot":
                start = "."
            case "field":
                start, rest = ".", tokens
            case "variable":
                start = token.text
            case "sign" if token.text == "(":
                depth, end = 1, 0
                while depth:
                    if end >= len(rest):
                        raise TemplateError("unclosed left parenthesis")
                    depth += {"(": 1, ")": -1}.get(rest[end].text, 0)
                    end += 1
                start, rest = self._pipeline(rest[: end - 1]), rest[end:]
            case _:
                raise TemplateError(f"unexpected {token.text!r}")
        fields: list[str] = []
        while rest and rest[0].kind == "field":
            fields.append(rest[0].text[1:])
            rest = rest[1:]
        return _Path(start, tuple(fields)), rest


class _Rendering:
    """One application of a template: its output, functions and variables."""

    def __init__(self, functions: Mapping[str, Function], record: Any) -> None:
        self.output: list[str] = []
        self._size = 0
        self._functions = functions
        self._variables: dict[str, Any] = {"$": record}

    def nodes(self, nodes: Sequence[_Node], dot: Any) -> None:
        for node in nodes:
            match node:
                case str():
                    self._write(node)
                case _Pipeline():
                    value = self._evaluate(node, dot)
                    if not node.variables:
                        self._write(text_of(value))
                case _Block():
                    self._block(node, dot)

    def _write(self, text: str) -> None:
        self._size += len(text)
        if self._size > MAX_OUTPUT:
            raise TemplateError("the result is too long")
        self.output.append(text)

    def _block(self, block: _Block, dot: Any) -> None:
        if block.kind == "range":
            self._range(block, dot)
            return
        value = self._evaluate(block.pipeline, dot)
        if _true(value):
            self.nodes(block.body, value if block.kind == "with" else dot)
        elif block.otherwise is not None:
            self.nodes(block.otherwise, dot)

    def _range(self, block: _Block, dot: Any) -> None:
        value = self._evaluate(_Pipeline((), block.pipeline.calls), dot)
        items: list[tuple[Any, Any]]
        if isinstance(value, Mapping):
            items = sorted(value.items())
        elif isinstance(value, list | tuple):
            items = list(enumerate(value))
        elif value is None:
            items = []
        else:
            raise TemplateError(f"range can't iterate over {text_of(value)}")
        names = block.pipeline.variables
        for key, item in items:
            if names:
                self._variables[names[-1]] = item
            if len(names) == 2:
                self._variables[names[0]] = key
            self.nodes(block.body, item)
        if not items and block.otherwise is not None:
            self.nodes(block.otherwise, dot)

    def _evaluate(self, pipeline: _Pipeline, dot: Any) -> Any:
        passed: tuple[Any, ...] = ()
        for call in pipeline.calls:
            arguments = [self._operand(argument, dot) for argument in call.arguments] + list(passed)
            if call.function:
                try:
                    value = self._functions[call.first](*arguments)
                except TemplateError:
                    raise
                except (TypeError, ValueError, LookupError, AttributeError) as error:
                    raise TemplateError(f"error calling {call.first}: {error}") from error
            elif arguments:
                raise TemplateError("can't give argument to non-function")
            else:
                value = self._operand(call.first, dot)
            passed = (value,)
        for name in pipeline.variables:
            self._variables[name] = passed[0]
        return passed[0]

    def _operand(self, operand: Any, dot: Any) -> Any:
        if isinstance(operand, _Literal):
            return operand.value
        assert isinstance(operand, _Path)
        if operand.start == ".":
            value = dot
        elif isinstance(operand.start, str):
            if operand.start not in self._variables:
                raise TemplateError(f'undefined variable "{operand.start}"')
            value = self._variables[operand.start]
        else:
            value = self._evaluate(operand.start, dot)
        for name in operand.fields:
            value = field_of(value, name)
        return value


def field_of(value: Any, name: str) -> Any:
    """Return a field of a record by its Go name, or what a map has under a key ("" if nothing)."""
    if isinstance(value, Mapping):
        return value.get(name, "")
    if isinstance(value, msgspec.Struct):
        plain = name.lower()
        for known in value.__struct_fields__:
            if known.replace("_", "") == ALIASES.get(plain, plain):
                return getattr(value, known)
    raise TemplateError(f"can't evaluate field {name}")


def text_of(value: Any) -> str:
    """Print a value as Go does."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case str():
            return str(value)
        case Enum():
            return value.name.lower()
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S.%f").rstrip("0").rstrip(".") + " +0000 UTC"
        case Mapping():
            return "map[" + " ".join(f"{text_of(k)}:{text_of(v)}" for k, v in sorted(value.items())) + "]"
        case list() | tuple():
            return "[" + " ".join(text_of(item) for item in value) + "]"
        case msgspec.Struct():
            return "{" + " ".join(text_of(getattr(value, name)) for name in value.__struct_fields__) + "}"
    return str(value)


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, text = 0, text.strip()
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            raise TemplateError(f"unexpected {text[position:].strip()[:20]!r}")
        if found.lastgroup == "field" and tokens and text[position].isspace():
            tokens.append(_Token("dot", "."))  # `.A .B` are two operands, `.A.B` is one
        tokens.append(_Token(found.lastgroup, found[found.lastgroup]))
        position = found.end()
    return tokens


def _unquoted(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    try:
        return str(msgspec.json.decode(text.encode(), type=str))
    except msgspec.DecodeError as error:
        raise TemplateError(f"bad string {text}") from error


def _true(value: Any) -> bool:
    return bool(value) or isinstance(value, msgspec.Struct | datetime)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key, "")
        elif isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise TemplateError(f"can't index {text_of(value)} with {text_of(key)}")
    return value


def _printf(text: str, *values: Any) -> str:
    rest = list(values)

    def one(found: re.Match[str]) -> str:
        if found[1] == "%":
            return "%"
        if not rest:
            return f"%!{found[1]}(MISSING)"
        value = rest.pop(0)
        return encode(text_of(value)).decode() if found[1] == "q" else text_of(value)

    return re.sub(r"%[-+0-9.]*([svdtq%])", one, text)


def _and(*values: Any) -> Any:
    return next((value for value in values if not _true(value)), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if _true(value)), values[-1])


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (isinstance(one, Enum) and text_of(one) == other)


_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "nil": None}
FUNCTIONS: dict[str, Function] = {
    "index": _index,
    "printf": _printf,
    "print": lambda *values: "".join(text_of(value) for value in values),
    "println": lambda *values: " ".join(text_of(value) for value in values) + "\n",
    "len": len,
    "not": lambda value: not _true(value),
    "and": _and,
    "or": _or,
    "eq": lambda one, *others: any(_same(one, other) for other in others),
    "ne": lambda one, other: not _same(one, other),
    "lt": lambda one, other: one < other,
    "le": lambda one, other: one <= other,
    "gt": lambda one, other: one > other,
    "ge": lambda one, other: one >= other,
    "json": lambda value: encode(value).decode(),
}
