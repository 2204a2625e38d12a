"""How a new program proves itself before the running daemon makes way for it: it reads everything, changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from flynn.daemon import ConfigError
from flynn.host.config import Config
from flynn.host.runtime import init
from flynn.host.runtime.spec import SPEC_FILE, from_json, protocol_of
from flynn.host.state import check
from flynn.host.update import Proof
from flynn.identity import Identity
from flynn.types.codec import encode
from flynn.version import VERSION


def prove(config: Config, descriptor: int) -> None:
    """Answer on `descriptor` if this program could take the running daemon's place. Raises `ConfigError`."""
    import flynn.host.daemon  # noqa: F401  # everything it needs can be imported

    try:
        config.key_file.read_text()
        Identity.load(config.identity_dir)
        check(config.state_dir / "host.db")
        for file in sorted((config.state_dir / "jobs").glob(f"*/{SPEC_FILE}")):
            _check_container(file)
    except Exception as error:  # whatever it is, the daemon must hear of it
        raise ConfigError(f"cannot take over: {error}") from error
    os.write(descriptor, encode(Proof(version=VERSION)))


def _check_container(file: Path) -> None:
    """See that a container could be taken over: its spec is readable, and its init speaks what we speak."""
    try:
        text = file.read_text()
    except FileNotFoundError:  # its job has ended this moment
        return
    from_json(text)
    if (spoken := protocol_of(text)) not in init.PROTOCOLS:
        raise ConfigError(f"the init of {file.parent.name} speaks protocol {spoken}, which this version does not know")
