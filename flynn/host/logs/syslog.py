"""What an operator's syslog sink is to look like: its configuration, and a record in its form. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from flynn.host.logs.record import Record
from flynn.host.template import Template, TemplateError
from flynn.types.codec import Json, Wire, convert
from flynn.types.errors import ValidationError
from flynn.types.host import META_APP_NAME, HostJob

DEFAULT_PORT = 514
FORMATS = ("rfc6587", "newline", "prefixed_newline")


class SyslogConfig(Wire):
    """The `config` of a sink of kind syslog, as it came."""

    url: str = ""
    template: str = ""
    use_ids: bool = False
    insecure: bool = False
    structured_data: bool = False
    format: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a sink's lines go."""

    host: str
    port: int
    tls: bool


FindJob = Callable[[str], HostJob | None]


def read(config: Json) -> tuple[SyslogConfig, Target]:
    """Check a configuration. Raises `ValidationError`."""
    syslog = convert(config or {}, SyslogConfig)
    url = urlsplit(syslog.url)
    if url.scheme not in ("syslog", "syslog+tls"):
        raise ValidationError("url", f"has the unknown protocol {url.scheme!r}")
    try:
        port = url.port or DEFAULT_PORT
    except ValueError as error:
        raise ValidationError("url", "has an impossible port") from error
    if not url.hostname:
        raise ValidationError("url", "names no host")
    if syslog.format and syslog.format not in FORMATS:
        raise ValidationError("format", f"must be one of {', '.join(FORMATS)}")
    prefix(syslog.template, HostJob())
    return syslog, Target(url.hostname, port, url.scheme == "syslog+tls")


def prefix(template: str, job: HostJob) -> str:
    """Evaluate a template over a job. Raises `ValidationError`."""
    try:
        return _read(template).render(job)
    except TemplateError as error:
        raise ValidationError("template", f"cannot be evaluated: {error}") from error


@functools.lru_cache(maxsize=64)
def _read(template: str) -> Template:
    return Template(template)


def line(record: Record, config: SyslogConfig, find: FindJob) -> bytes:
    """Return a record in the sink's form and framing."""
    job = find(record.process.decode(errors="replace").partition(".")[2] or record.process.decode(errors="replace"))
    words = record.message.split(b" ", 6)
    structured = b"-"
    if config.structured_data:
        end = words[6].index(b'"]') + 2
        structured = words[6][:end]
    if not config.use_ids:
        words[3] = (job.metadata.get(META_APP_NAME, "") if job else "").encode() or b"-"
    lead = prefix(config.template, job).encode() if config.template and job is not None else b""
    prefixed = config.format == "prefixed_newline"
    text = record.text if prefixed or not lead else lead + b" " + record.text
    message = b" ".join([*words[:6], structured, text] if text else [*words[:6], structured])
    match config.format:
        case "newline":
            return message + b"\n"
        case "prefixed_newline":
            return (lead + b" " if lead else b"") + message + b"\n"
        case _:
            return b"%d %s" % (len(message), message)
