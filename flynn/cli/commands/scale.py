"""`flynn scale`: how many jobs of each type, and the wait until they are there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from flynn.cli.command import argument, flag, leaf, option
from flynn.cli.context import Context, show
from flynn.cli.errors import CliError
from flynn.cli.output import duration

if TYPE_CHECKING:
    from flynn.controller.client import Controller
    from flynn.types.formation import ScaleRequest
    from flynn.types.job import Job
    from flynn.types.release import Release

SCALE = """
usage: flynn scale [options] [<type>=<spec>...]

Scale changes the number of jobs and tags for each process type in a release.

Ommitting the arguments will show the current scale.

Options:
    -n, --no-wait        don't wait for the scaling events to happen
    -r, --release <id>   id of release to scale (defaults to current app release)
    -a, --all            show non-zero formations from all releases (only works when listing formations, can't be
                         combined with --release)
    -t, --timeout <sec>  seconds to wait for the jobs [default: 30]

Examples:

    $ flynn scale
    web=4 worker=2

    $ flynn scale web=2 worker=5
    scaling web: 4=>2, worker: 2=>5

    02:28:34.333 ==> web flynn-3f656af6f1c3d6d2b63fce3f0a7bd6ef up
    02:28:35.327 ==> worker flynn-adb1b3b35ec4cd58b5d2e0c3d2dfb0d8 up

    scale completed in 944.962ms
"""


@dataclass(frozen=True, slots=True)
class Spec:
    """What the arguments ask for."""

    processes: dict[str, int] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)


def parse(words: Sequence[str], known: Sequence[str]) -> Spec:
    spec, unknown = Spec(), []
    for word in words:
        type, equals, rest = word.partition("=")
        if not equals:
            raise CliError("ERROR: scale args must be of the form <typ>=<spec>")
        count, *tags = rest.split(",")
        try:
            quantity = int(count)
        except ValueError:
            raise CliError(f'ERROR: could not parse quantity in "{word}"') from None
        if quantity < 0:
            raise CliError(f'ERROR: process quantities cannot be negative in "{word}"')
        if type not in known:
            unknown.append(f'"{type}"')
        spec.processes[type] = quantity
        if tags:
            spec.tags[type] = {key: value if eq else "true" for key, eq, value in (tag.partition("=") for tag in tags)}
    if unknown:
        raise CliError(f"ERROR: unknown process types: {', '.join(unknown)}")
    return spec


def announcement(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """`scaling web: 4=>2, worker: 2=>5`: only what changes, in the order of names."""
    changes = [f"{type}: {old.get(type, 0)}=>{new[type]}" for type in sorted(new) if old.get(type, 0) != new[type]]
    return "scaling " + ", ".join(changes)


def pairs(counts: Mapping[str, int]) -> str:
    return " ".join(f"{type}={count}" for type, count in sorted(counts.items()))


async def scale(
    context: Context, no_wait: bool, release: str | None, all: bool, timeout: str, specs: tuple[str, ...]
) -> None:
    if all and specs:
        raise CliError("ERROR: Can't use --all when scaling")
    if all and release:
        raise CliError("ERROR: Can't use --all in combination with --release")
    async with context.controller() as controller:
        target = await _release(controller, context.app, release)
        if not specs:
            await _show(controller, context.app, target, everything=all)
            return
        spec = parse(specs, list(target.processes))
        await _scale(controller, context.app, target, spec, wait=not no_wait, timeout=_seconds(timeout))


def _seconds(text: str) -> timedelta:
    try:
        return timedelta(seconds=float(text))
    except ValueError:
        raise CliError(f'ERROR: could not parse timeout "{text}"') from None


async def _release(controller: Controller, app: str, id: str | None) -> Release:
    from flynn.types.errors import NotFound

    if id:
        return await controller.release(id)
    try:
        return await controller.app_release(app)
    except NotFound:
        raise CliError("No app release, specify a release with --release") from None


async def _show(controller: Controller, app: str, release: Release, *, everything: bool) -> None:
    releases = await controller.app_releases(app) if everything else [release]
    blocks = []
    for shown in releases:
        counts = await _counts(controller, app, shown)
        if counts is None:
            continue
        if not everything:
            blocks.append(pairs({type: counts.get(type, 0) for type in shown.processes}))
        elif any(counts.values()):
            name = f"{shown.id} (current)" if shown.id == release.id else shown.id
            blocks.append(f"{name}\n{pairs({type: count for type, count in counts.items() if count})}")
    if blocks:
        show("\n\n".join(blocks))


async def _counts(controller: Controller, app: str, release: Release) -> dict[str, int] | None:
    from flynn.types.errors import NotFound

    try:
        formation = await controller.formation(app, release.id)
    except NotFound:
        return None
    return formation.processes


async def _scale(
    controller: Controller, app: str, release: Release, spec: Spec, *, wait: bool, timeout: timedelta
) -> None:
    from flynn.types.formation import ScaleRequest, ScaleState

    began = time.monotonic()

    def on_created(request: ScaleRequest) -> None:
        show(announcement(request.old_processes or {}, request.new_processes or {}) + "\n")

    def on_job(job: Job) -> None:
        stamp = datetime.now().strftime("%H:%M:%S.%f")[:-3]
        show(f"{stamp} ==> {job.type} {job.id or job.uuid} {job.state}")

    if not wait:
        request = ScaleRequest(
            app=app,
            release=release.id,
            state=ScaleState.PENDING.value,
            new_processes=spec.processes,
            new_tags=spec.tags,
        )
        on_created(await controller.put_scale_request(request))
        return
    await controller.scale(
        app,
        release.id,
        spec.processes,
        tags=spec.tags,
        timeout=timeout,
        on_created=on_created,
        on_job=on_job,
    )
    show(f"\nscale completed in {duration(time.monotonic() - began)}")


NODES = {
    "scale": leaf(
        SCALE,
        scale,
        flag("-n", "--no-wait"),
        option("-r", "--release"),
        flag("-a", "--all"),
        option("-t", "--timeout", default="30"),
        argument("specs", required=False, many=True),
    )
}
