"""What a daemon of ours says about itself in the directory."""

from __future__ import annotations

from collections.abc import Mapping

from flynn.types.instance import Instance

IDENTIFYING = ("FLYNN_APP_ID", "FLYNN_APP_NAME", "FLYNN_RELEASE_ID", "FLYNN_PROCESS_TYPE", "FLYNN_JOB_ID")
"""Metadata every instance carries when its environment has it: who looks at a service can tell which job this is."""


def instance_from_environment(
    environ: Mapping[str, str], port: int | str, proto: str = "tcp", *, meta: Mapping[str, str] | None = None
) -> Instance:
    """This job as an instance: `EXTERNAL_IP` with `port`, the identifying FLYNN_* variables, and `meta` on top."""
    identity = {key: environ[key] for key in IDENTIFYING if environ.get(key)}
    return Instance.at(join_host_port(environ["EXTERNAL_IP"], port), proto, identity | dict(meta or {}))


def join_host_port(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
