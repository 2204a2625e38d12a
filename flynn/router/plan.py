"""The smallest change that takes a running HAProxy from one configuration to the next. Pure.

Servers, map entries and certificates change while it runs; anything in the skeleton (front ends, backends, settings)
needs a reload, and so does what the running process cannot do in place. The order keeps every moment servable: what
is new exists before something refers to it, what goes is no longer referred to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain

from flynn.router.render import BASE, CRT_LIST, Rendered

ServerRef = tuple[str, str]
"""Backend and server name."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Start a new worker on the new files; the old one finishes what it has."""

    reason: str


@dataclass(frozen=True, slots=True)
class AddServer:
    backend: str
    name: str
    options: str


@dataclass(frozen=True, slots=True)
class ReviveServer:
    """Take back a server that was being retired."""

    backend: str
    name: str


@dataclass(frozen=True, slots=True)
class RetireServer:
    """No new requests; those in flight finish. It is deleted when it is idle."""

    backend: str
    name: str


@dataclass(frozen=True, slots=True)
class AddEntry:
    map: str
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class SetEntry:
    map: str
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class DropEntry:
    map: str
    key: str


@dataclass(frozen=True, slots=True)
class AddCertificate:
    file: str
    name: str
    pem: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SetCertificate:
    """New content for a file that is in use."""

    file: str
    pem: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class DropCertificate:
    file: str


Change = (
    Reload
    | AddServer
    | ReviveServer
    | RetireServer
    | AddEntry
    | SetEntry
    | DropEntry
    | AddCertificate
    | SetCertificate
    | DropCertificate
)


def plan(old: Rendered, new: Rendered, retiring: Collection[ServerRef] = ()) -> tuple[Change, ...]:
    """What to do, in order; one `Reload` alone if only that helps.

    `retiring` are servers that left earlier and still exist because requests are in flight.
    """
    if (reason := _needs_reload(old, new)) is not None:
        return (Reload(reason),)
    before = {(b, n): options for b, group in old.servers.items() for n, options in group.items()}
    after = {(b, n): options for b, group in new.servers.items() for n, options in group.items()}
    arriving = [ref for ref in after if ref not in before]
    entries_before = {(m, k): v for m, entries in old.maps.items() for k, v in entries.items()}
    entries_after = {(m, k): v for m, entries in new.maps.items() for k, v in entries.items()}
    return tuple(
        chain(
            (_certificate_change(file, old, new) for file, pem in new.certificates.items()
             if old.certificates.get(file) != pem),
            (ReviveServer(*ref) if ref in retiring else AddServer(*ref, after[ref]) for ref in arriving),
            (
                SetEntry(*where, value) if where in entries_before else AddEntry(*where, value)
                for where, value in entries_after.items()
                if entries_before.get(where) != value
            ),
            (DropEntry(*where) for where in entries_before if where not in entries_after),
            (RetireServer(*ref) for ref in before if ref not in after),
            (DropCertificate(file) for file in old.names if file not in new.names),
        )
    )  # fmt: skip


def _certificate_change(file: str, old: Rendered, new: Rendered) -> Change:
    if file in old.certificates:
        return SetCertificate(file, new.certificates[file])
    return AddCertificate(file, new.names[file], new.certificates[file])


def _needs_reload(old: Rendered, new: Rendered) -> str | None:
    if old.generation != new.generation:
        return "front ends, backends or settings changed"
    for backend, servers in new.servers.items():
        for name, options in servers.items():
            if old.servers[backend].get(name, options) != options:
                return f"the options of server {backend}/{name} changed"
    unlisted_before = old.certificates.keys() - old.names.keys()
    if unlisted_before != new.certificates.keys() - new.names.keys():
        return "the default pair or the identity appeared or went away"
    return None


def commands(change: Change) -> list[str]:
    """What to say to the runtime API, with placeholders for the directories. One answer is expected per element."""
    match change:
        case AddServer(backend, name, options):
            return [f"add server {backend}/{name} {options}", f"enable server {backend}/{name}"]
        case ReviveServer(backend, name):
            return [f"set server {backend}/{name} state ready"]
        case RetireServer(backend, name):
            # `maint` and not `drain`: a draining server still gets requests that carry its cookie.
            return [f"set server {backend}/{name} state maint"]
        case AddEntry(map, key, value):
            return [f"add map {BASE}/{map} {key} {value}"]
        case SetEntry(map, key, value):
            return [f"set map {BASE}/{map} {key} {value}"]
        case DropEntry(map, key):
            return [f"del map {BASE}/{map} {key}"]
        case AddCertificate(file, name, pem):
            return [
                f"new ssl cert {BASE}/{file}",
                *_store(file, pem),
                f"add ssl crt-list {BASE}/{CRT_LIST} <<\n{BASE}/{file} {name}\n",
            ]
        case SetCertificate(file, pem):
            return _store(file, pem)
        case DropCertificate(file):
            return [f"del ssl crt-list {BASE}/{CRT_LIST} {BASE}/{file}", f"del ssl cert {BASE}/{file}"]
        case Reload():
            raise ValueError("a reload is not a command")


def _store(file: str, pem: str) -> list[str]:
    # An empty line would end the payload.
    payload = "\n".join(line for line in pem.splitlines() if line.strip())
    return [f"set ssl cert {BASE}/{file} <<\n{payload}\n", f"commit ssl cert {BASE}/{file}"]


_ACCEPTED = (
    "",
    "New server registered.",
    "New empty certificate store",
    "Transaction created for certificate",
    "Transaction updated for certificate",
    "Committing",
    "Inserting certificate",
    "Entry",
    "Certificate",
    "Server deleted.",
)


def accepted(answer: str) -> bool:
    """Whether HAProxy did what it was told; it has no codes, only sentences."""
    text = answer.strip()
    if text.startswith(("Committing", "Inserting")):
        return "Success" in text
    if text.startswith(("Entry", "Certificate")):
        return "deleted" in text
    return text == "" or any(text.startswith(known) for known in _ACCEPTED if known)
