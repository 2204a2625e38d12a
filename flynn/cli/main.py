"""The `flynn` command: reads the global options, finds the command, and is the edge where every error becomes a line.

Nothing heavy is imported here: which module holds a command is a table, and only that one is loaded.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from flynn.cli.errors import CliError, Done, UsageError

if TYPE_CHECKING:
    from flynn.cli.command import Node

TOP_USAGE = "usage: flynn [-a <app>] [-c <cluster>] <command> [<args>...]"

COMMANDS: dict[str, tuple[str, str]] = {
    "help": ("", "show usage for a specific command"),
    "cluster": ("cluster", "manage clusters"),
    "create": ("apps", "create an app"),
    "delete": ("apps", "delete an app"),
    "apps": ("apps", "list apps"),
    "info": ("apps", "show app information"),
    "ps": ("jobs", "list jobs"),
    "kill": ("jobs", "kill jobs"),
    "log": ("jobs", "get app log"),
    "scale": ("scale", "change formation"),
    "run": ("jobs", "run a job"),
    "env": ("env", "manage env variables"),
    "limit": ("limit", "manage resource limits"),
    "meta": ("env", "manage app metadata"),
    "route": ("route", "manage routes"),
    "pg": ("databases", "manage postgres database"),
    "mysql": ("databases", "manage mysql database"),
    "mongodb": ("databases", "manage mongodb database"),
    "redis": ("databases", "manage redis database"),
    "provider": ("providers", "manage resource providers"),
    "remote": ("apps", "manage git remotes"),
    "resource": ("providers", "provision a new resource"),
    "release": ("releases", "manage app releases"),
    "deployment": ("deployments", "list deployments"),
    "volume": ("deployments", "manage volumes"),
    "version": ("", "show flynn version"),
}
"""Word, module below `flynn.cli.commands`, and what `flynn help` says of it."""

HIDDEN: dict[str, str] = {"git-credentials": "cluster"}

GONE = {
    "install": "flynn install is no more: see the README for how to set up a cluster.",
    "update": "flynn does not update itself: it is installed by pip or your distribution.",
    "login": "flynn login is no more: add the cluster with its key, see 'flynn help cluster'.",
}


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code. No exception gets past this."""
    try:
        dispatch(arguments)
    except BaseException as error:
        # The edge: whatever happened becomes an exit code, and a line if there is something to say.
        return outcome(error)
    return 0


def outcome(error: BaseException) -> int:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case Done(code=code):
            return code
        case UsageError():
            sys.stdout.write(str(error))
            return 1
        case CliError():
            print(error, file=sys.stderr)
            return 1
        case KeyboardInterrupt():
            return 130
        case BrokenPipeError():
            # Whoever read our output has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        case SystemExit():
            raise error
        case _:
            if os.environ.get("FLYNN_DEBUG"):
                raise error
            print(explain(error), file=sys.stderr)
            return 1


def explain(error: BaseException) -> str:
    """One line about an error of any kind. FLYNN_DEBUG in the environment shows where it came from."""
    from flynn.types.errors import ApiError, NotFound, Unauthorized, Unreachable

    if isinstance(error, Unreachable):
        return error.message
    # The controller refuses these two without a word of its own.
    if isinstance(error, NotFound) and error.message == "resource not found":
        return f"controller: {error.message}"
    if isinstance(error, Unauthorized) and error.message == f"unexpected status {int(error.status)}":
        return "unauthorized: the cluster does not accept this key"
    if isinstance(error, ApiError):
        return str(error)
    text = str(error)
    return text if type(error).__module__.startswith("flynn.") and text else f"{type(error).__name__}: {text}"


def dispatch(arguments: list[str]) -> None:
    app, cluster = "", ""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        match name:
            case "-h" | "--help":
                sys.stdout.write(top_help())
                return
            case "--version":
                version()
                return
            case "-a" | "-c" | "--app" | "--cluster":
                if not equals:
                    if not rest:
                        raise UsageError(TOP_USAGE + "\n")
                    value = rest.pop(0)
                if name in ("-a", "--app"):
                    app = value
                else:
                    cluster = value
            case _:
                raise UsageError(TOP_USAGE + "\n")
    if not rest:
        raise UsageError(TOP_USAGE + "\n")
    word, given = rest[0], rest[1:]
    if word == "help":
        show_help(given)
        return
    if word == "version":
        version()
        return
    if word in GONE:
        print(GONE[word], file=sys.stderr)
        raise Done(1)
    node = load(word)
    before_dashes = given[: given.index("--")] if "--" in given else given
    asks_help = before_dashes[:1] if word == "run" else before_dashes
    if "--help" in asks_help or "-h" in asks_help:
        sys.stdout.write(node.usage.strip() + "\n")
        return
    perform(node, given, app, cluster)


def perform(node: Node, given: list[str], app: str, cluster: str) -> None:
    import click

    from flynn.cli.context import Context

    command, left = node.find(given)
    try:
        command.main(left, prog_name="flynn", standalone_mode=False, obj=Context(app, cluster))
    except click.UsageError:
        raise UsageError(node.usage_block) from None


def load(word: str) -> Node:
    module = HIDDEN.get(word) or COMMANDS.get(word, ("", ""))[0]
    if not module:
        raise CliError(f"{word} is not a flynn command. See 'flynn help'")
    nodes: dict[str, Node] = importlib.import_module(f"flynn.cli.commands.{module}").NODES
    return nodes[word]


def version() -> None:
    from flynn.version import VERSION

    print(VERSION)


def top_help() -> str:
    lines = [
        TOP_USAGE,
        "",
        "Options:",
        "\t-a <app>",
        "\t-c <cluster>",
        "\t-h, --help",
        "",
        "Commands:",
        *(f"\t{word.ljust(12)}{summary}" for word, (_, summary) in COMMANDS.items()),
        "",
        "See 'flynn help <command>' for more information on a specific command.",
    ]
    return "\n".join(lines) + "\n"


def show_help(given: list[str]) -> None:
    if not given:
        sys.stdout.write(top_help() + "\n")
        return
    if given == ["--json"]:
        import json

        words = sorted(word for word in [*COMMANDS, *HIDDEN] if word not in ("help", "version"))
        print(json.dumps({word: load(word).usage.strip() + "\n" for word in words}, indent="\t"))
        return
    if given == ["commands"]:
        print("\n".join(COMMANDS))
        return
    word = given[0]
    if word in ("help", "version"):
        sys.stdout.write(f"usage: flynn {word}\n")
        return
    sys.stdout.write(load(word).usage.strip() + "\n")
