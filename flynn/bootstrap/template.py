"""The templates of a bootstrap manifest. Pure.

Manifests are written for Go's text/template; of it they use five forms, and these are understood:

    {{ getenv "NAME" }}                        {{ .Singleton }}
    {{ md5sum (any of these) }}                {{ (index .StepData "step-id").Field }}
    {{ range $ip := .SortedHostIPs }}{{ $ip }}:1111,{{ end }}

and one of ours: `.MemberIPs` in the place of `.SortedHostIPs`, the hosts whose discoverds keep the directory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RANGE = re.compile(r"\{\{\s*range\s+\$(\w+)\s*:=\s*\.(SortedHostIPs|MemberIPs)\s*\}\}(.*?)\{\{\s*end\s*\}\}", re.S)
_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}")
_STEP_DATA = re.compile(r'\(\s*index\s+\.StepData\s+"([^"]+)"\s*\)\.(\w+)')
_GETENV = re.compile(r'getenv\s+"([^"]+)"')

_FIELDS = {"Data": "data", "CACert": "ca_cert", "Cert": "cert", "Key": "key", "Pin": "pin", "ID": "id"}
"""Go's field names of what steps leave behind, and the keys under which they are recorded."""


class TemplateError(ValueError):
    """A template asks for something that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a template can refer to."""

    step_data: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, str]
    host_ips: Sequence[str]
    singleton: bool


def render(text: str, scope: Scope) -> str:
    """Replace every template in `text`. Raises TemplateError for what is not understood or not there yet."""

    def repeat(match: re.Match[str]) -> str:
        variable, which, body = match.groups()
        each = re.compile(r"\{\{\s*\$" + variable + r"\s*\}\}")
        ips = member_ips(scope.host_ips) if which == "MemberIPs" else sorted(scope.host_ips)
        return "".join(each.sub(ip, body) for ip in ips)

    return _ACTION.sub(lambda match: _evaluate(match.group(1), scope), _RANGE.sub(repeat, text))


def member_ips(host_ips: Sequence[str]) -> list[str]:
    """The hosts that keep the directory: an odd number, since one more would not survive more losses. Five at most."""
    ips = sorted(host_ips)
    return ips[: min(len(ips) if len(ips) % 2 else len(ips) - 1, 5)]


def render_environment(environment: Mapping[str, str], scope: Scope) -> dict[str, str]:
    """Render every value; variables that come out empty are dropped."""
    rendered = {name: render(value, scope) for name, value in environment.items()}
    return {name: value for name, value in rendered.items() if value}


def _evaluate(expression: str, scope: Scope) -> str:
    if expression == ".Singleton":
        return str(scope.singleton).lower()
    if expression.startswith("md5sum "):
        argument = _evaluate(expression.removeprefix("md5sum ").strip(), scope)
        return hashlib.md5(argument.encode(), usedforsecurity=False).hexdigest()
    if match := _GETENV.fullmatch(expression.strip("()")):
        return scope.environment.get(match.group(1), "")
    if match := _STEP_DATA.fullmatch(expression):
        step, field = match.groups()
        data = scope.step_data.get(step)
        if data is None:
            raise TemplateError(f"step {step!r} has not left any data")
        key = _FIELDS.get(field, field.lower())
        if key not in data:
            raise TemplateError(f"step {step!r} has no {field}")
        return str(data[key])
    raise TemplateError(f"not understood: {{{{ {expression} }}}}")
