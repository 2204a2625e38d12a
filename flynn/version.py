"""The version this copy of Flynn reports: a release is `vYYYYMMDD.N`, a source checkout is `dev`."""

import os

VERSION = os.environ.get("FLYNN_VERSION", "dev")
