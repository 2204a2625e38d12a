"""flynn-slugbuilder: builds the source on standard input, once, in a job of its own."""

from __future__ import annotations

import os
import signal
import sys

from flynn.slugbuilder.build import Build
from flynn.slugbuilder.buildpacks import StepFailed
from flynn.slugbuilder.procfile import Malformed
from flynn.slugbuilder.settings import Settings
from flynn.slugbuilder.transfer import TransferFailed


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except (KeyError, ValueError) as error:
        sys.exit(f"ERROR: not a build job: {error}")
    os.umask(0o022)
    # Whoever started the build watches it, but may be killed: the job then ends by itself.
    signal.alarm(int(os.environ.get("BUILD_SECONDS") or 0))
    try:
        Build(settings, sys.stdin.buffer, sys.stdout.buffer).run()
    except StepFailed as error:
        if error.args[0] and not str(error).startswith("exit status"):
            print(f"ERROR: {error}", file=sys.stderr)
        sys.exit(error.status)
    except Malformed as error:
        sys.exit(f"ERROR: {error}")
    except (TransferFailed, OSError) as error:
        sys.exit(f"ERROR: could not create slug image: {error}")


if __name__ == "__main__":
    main()
