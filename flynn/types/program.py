"""The program of a release: flynn-host with everything it needs, as wheels for one kind of Python."""

from __future__ import annotations

from flynn.types.codec import Wire, always


class Wheel(Wire):
    """A file of the release: what pip calls it, and its name in the repository."""

    name: str
    target: str


class Program(Wire):
    """`<version>/program.json.gz`. `python` is the kind of Python and machine that the wheels are for."""

    python: str = always("")
    wheels: list[Wheel] = always([])


def python_kind(major: int, minor: int, platform: str) -> str:
    """Name a kind of Python: two machines with the same can run the same wheels."""
    return f"cp{major}{minor}-{platform}"


def program_target(version: str) -> str:
    return f"{version}/program.json.gz"


def wheel_target(digest: str, name: str) -> str:
    return f"wheels/{digest}/{name}"
