"""What may end a command early: a message for the user and an exit code. Nothing else reaches the terminal."""

from __future__ import annotations


class CliError(Exception):
    """Printed as one plain line on standard error; exit code 1."""


class UsageError(Exception):
    """The arguments do not fit the command: its usage is shown on standard output; exit code 1."""


class Done(Exception):
    """The command is over with this exit code, and has said what there was to say."""

    def __init__(self, code: int) -> None:
        self.code = code
