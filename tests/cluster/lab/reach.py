"""Talk to what runs on a node without starting the operator's client each time: quick enough to be asked in a loop."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

from tests.cluster.lab.layout import Node

HOST_API, DISCOVERD_API = 1113, 1111


class NoAnswer(Exception):
    """Nothing usable came back: no connection, too slow, or not JSON."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str

    def json(self) -> object:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise NoAnswer(f"no JSON: {self.body[:200]!r}") from error


def ask(
    member: Node, port: int, path: str, *, method: str = "GET", body: str | None = None, seconds: float = 3
) -> Answer:
    """A request to a daemon of the node on its own loopback, as its operator. Raises NoAnswer."""
    options = ["-X", method, "-u", ":" + (member.config / "host.key").read_text().strip()]
    if body is not None:
        options += ["-H", "Content-Type: application/json", "-d", body]
    into = ("nsenter", f"--net=/run/netns/{member.namespace}", "--")
    return _curl([*into, "curl"], [*options, f"http://127.0.0.1:{port}{path}"], seconds)


def through(router: Node, url: str, *options: str, seconds: float = 3) -> Answer:
    """A request from outside that enters the cluster at one node, whatever the names say. Raises NoAnswer."""
    host = url.split("/")[2]
    return _curl(["curl"], ["-k", "--connect-to", f"{host}::{router.ip}:", *options, url], seconds)


def _curl(command: list[str], arguments: list[str], seconds: float) -> Answer:
    done = subprocess.run(
        [*command, "-sS", "-m", str(seconds), "-w", "\n%{http_code}", *arguments],
        capture_output=True, text=True, timeout=seconds + 20, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise NoAnswer(done.stderr.strip() or f"curl ended with {done.returncode}")
    text, _, status = done.stdout.rpartition("\n")
    return Answer(int(status), text)
