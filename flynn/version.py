"""The version this copy of Flynn reports: a release is `vYYYYMMDD.N`, a source checkout is `dev`."""

import os
import sys

STAMP = "flynn-version"  # file in the Python environment of an installed release


def _installed() -> str:
    try:
        with open(os.path.join(sys.prefix, STAMP)) as file:
            return file.read().strip()
    except OSError:
        return ""


VERSION = os.environ.get("FLYNN_VERSION") or _installed() or "dev"
