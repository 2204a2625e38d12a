"""flynn-slugrunner: `/runner/init start <type>` or `/runner/init <command> <argument>...` in a slug.

Sources `.profile.d/*` in order of name, then `.profile`, and becomes the command. A variable that a buildpack's release
gives a default for has it unless the job's environment says otherwise. spec/build-pipeline.md section 6.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flynn.slugbuilder.procfile import Malformed, parse_procfile, parse_release, process_commands

START = """
set -e
shopt -s nullglob
for __file in .profile.d/*; do
  [[ -f $__file ]] && source "$__file"
done
[[ -f .profile ]] && source .profile
unset __file
set +e
exec bash -c "$0"
"""
"""The shell that prepares the environment; `$0` is the command. A failing profile ends the start."""


def command_for(arguments: Sequence[str], app: Path) -> str:
    """Return the shell command that `arguments` ask for; empty for a type nobody declared.

    Raises:
        Malformed: the Procfile or `.release` of the slug cannot be understood.
    """
    if len(arguments) == 2 and arguments[0] == "start":
        release = parse_release(_text(app / ".release"))
        return process_commands(parse_procfile(_text(app / "Procfile")), release.default_process_types).get(
            arguments[1], ""
        )
    return shlex.join(arguments)


def environment_for(environ: Mapping[str, str], app: Path) -> dict[str, str]:
    """Return the environment of the app: the buildpack's defaults below the job's own."""
    defaults = parse_release(_text(app / ".release")).config_vars
    return {**defaults, **environ, "HOME": environ.get("HOME") or str(app)}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except (FileNotFoundError, IsADirectoryError):
        return ""


def main() -> None:
    app = Path(os.environ.get("APP_DIR") or "/app")
    try:
        os.chdir(app)
        command = command_for(sys.argv[1:], app)
        environment = environment_for(os.environ, app)
    except (Malformed, OSError) as error:
        sys.exit(f"ERROR: {error}")
    if not command:
        sys.exit(0)  # as the original: a type without a command has nothing to do
    os.execve("/bin/bash", ["bash", "-c", START, command], environment)


if __name__ == "__main__":
    main()
