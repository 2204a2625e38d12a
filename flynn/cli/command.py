"""How commands are declared and found: a tree of words, each leaf a click command with its usage text.

The grammar is the original's: options and arguments in any order, long options may be shortened to a unique prefix,
`--` ends options. Only `run` and the top level stop reading options at the first argument.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import click

from flynn.cli.context import Context
from flynn.cli.errors import Done, UsageError

Body = Callable[..., Coroutine[Any, Any, None]]


@dataclass
class Node:
    """A word of the command line: what it does by itself, and what it does with another word after it."""

    usage: str
    action: click.Command | None = None
    words: dict[str, Node] = field(default_factory=dict)

    @property
    def usage_block(self) -> str:
        return self.usage.strip().split("\n\n", 1)[0] + "\n"

    def find(self, arguments: list[str]) -> tuple[click.Command, list[str]]:
        """The command that the arguments mean, and what is left for it."""
        if self.words:
            position = self._first_word(arguments)
            if position is not None and arguments[position] in self.words:
                word = self.words[arguments[position]]
                return word.find(arguments[:position] + arguments[position + 1 :])
        if self.action is None:
            raise UsageError(self.usage_block)
        return self.action, arguments

    def _first_word(self, arguments: list[str]) -> int | None:
        """Where the first argument stands that is neither an option nor an option's value."""
        with_value = self._options_with_value()
        skip = False
        for index, argument in enumerate(arguments):
            if skip:
                skip = False
            elif argument == "--":
                return None
            elif argument.startswith("-") and len(argument) > 1:
                skip = argument in with_value
            else:
                return index
        return None

    def _options_with_value(self) -> set[str]:
        found = set()
        if self.action is not None:
            for option in self.action.params:
                if isinstance(option, click.Option) and not option.is_flag:
                    found.update(option.opts)
        for word in self.words.values():
            found |= word._options_with_value()
        return found


class Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.allow_interspersed_args:
            args = self._spelled_out(args)
        return super().parse_args(ctx, args)

    def _spelled_out(self, args: list[str]) -> list[str]:
        """Long options in full: `--al` is `--all` if no other begins like that."""
        known = [name for option in self.params if isinstance(option, click.Option) for name in option.opts]
        known += [name for option in self.params if isinstance(option, click.Option) for name in option.secondary_opts]
        result: list[str] = []
        for index, argument in enumerate(args):
            if argument == "--":
                return result + args[index:]
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                matches = [option for option in known if option.startswith(name)]
                if name not in known and len(matches) == 1:
                    argument = f"{matches[0]}{equals}{value}"
            result.append(argument)
        return result


def option(*names: str, **settings: Any) -> click.Option:
    return click.Option(list(names), **settings)


def flag(*names: str) -> click.Option:
    return click.Option(list(names), is_flag=True)


def argument(name: str, *, required: bool = True, many: bool = False, **settings: Any) -> click.Argument:
    if not many and not required:
        settings["default"] = None
    return click.Argument([name], required=required, nargs=-1 if many else 1, **settings)


def leaf(usage: str, body: Body, *params: click.Parameter, options_first: bool = False) -> Node:
    """A command. `body` is called with the Context and the parameters by name."""

    @click.pass_obj
    def call(context: Context, /, **values: Any) -> None:
        run(body(context, **values))

    command = Command(
        None,
        callback=call,
        params=list(params),
        add_help_option=False,
        context_settings={"allow_interspersed_args": not options_first},
    )
    command.allow_interspersed_args = not options_first
    return Node(usage, command)


def tree(usage: str, action: Node | None = None, **words: Node) -> Node:
    """A command with subcommands; `_` in a word stands for a dash."""
    named = {word.replace("_", "-"): node for word, node in words.items()}
    return Node(usage, action.action if action else None, named)


def run(body: Coroutine[Any, Any, None]) -> None:
    """Run to the end; SIGTERM ends like SIGINT, with the exit code a shell expects of it."""

    async def until_told() -> None:
        task = asyncio.current_task()
        assert task is not None
        terminated = False

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        try:
            await body
        except asyncio.CancelledError:
            if terminated:
                raise Done(128 + signal.SIGTERM) from None
            raise

    asyncio.run(until_told())
