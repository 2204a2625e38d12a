"""Deployments and volumes of an app."""

from __future__ import annotations

from datetime import UTC, datetime

from flynn.cli.command import argument, flag, leaf, tree
from flynn.cli.context import Context, show
from flynn.cli.errors import CliError
from flynn.cli.output import age, moment, table

DEPLOYMENT = """
usage: flynn deployment
       flynn deployment timeout [<timeout>]
       flynn deployment batch-size [<size>]

Manage deployments.

Commands:
    With no arguments, shows a list of deployments.

    timeout     gets or sets the number of seconds to wait for each job to start when deploying
    batch-size  gets or sets the batch size for deployments using the in-batches strategy
"""

VOLUME = """
usage: flynn volume
       flynn volume show [--json] <id>
       flynn volume decommission <id>

Manage cluster volumes.

Commands:
    With no arguments, shows a list of current volumes.

    show          show information about a volume
    decommission  mark a volume as no longer to be used by jobs
"""

BATCH_SIZE = "flynn-deploy-batch-size"


async def listing(context: Context) -> None:
    async with context.controller() as controller:
        deployments = await controller.deployments(context.app)
    now = datetime.now(UTC)
    reasons = [d.error.partition("\n")[0] for d in deployments]
    rows = [["ID", "STATUS", "CREATED", "FINISHED"]]
    rows += [[d.id, d.status, age(d.created_at, now), age(d.finished_at, now)] for d in deployments]
    if any(reasons):  # one column more than the original has, and only where it says something
        rows = [[*row, last] for row, last in zip(rows, ["ERROR", *reasons], strict=True)]
    show(table(rows), end="")


async def timeout(context: Context, seconds: int | None) -> None:
    from flynn.controller.wire import AppUpdate

    async with context.controller() as controller:
        if seconds is None:
            show(str((await controller.app(context.app)).deploy_timeout))
        else:
            await controller.update_app(context.app, AppUpdate(deploy_timeout=seconds))


async def batch_size(context: Context, size: int | None) -> None:
    async with context.controller() as controller:
        app = await controller.app(context.app)
        if size is None:
            show(app.meta.get(BATCH_SIZE, "not set"))
        elif size < 1:
            raise CliError("the batch size must be at least 1")
        else:
            # Read, changed, written: the rest of the metadata stays.
            await controller.set_app_meta(app.id, {**app.meta, BATCH_SIZE: str(size)})


async def volumes(context: Context) -> None:
    async with context.controller() as controller:
        found = await controller.app_volumes(context.app)
    now = datetime.now(UTC)
    rows = [["ID", "HOST", "STATE", "ATTACHED JOB", "CREATED", "DECOMMISSIONED"]]
    for volume in found:
        job = f"{volume.host_id}-{volume.job}" if volume.job else ""
        gone = "true" if volume.decommissioned_at else "false"
        rows.append([volume.id, volume.host_id, volume.state, job, age(volume.created_at, now), gone])
    show(table(rows), end="")


async def show_volume(context: Context, json: bool, id: str) -> None:
    from flynn.types.codec import encode

    async with context.controller() as controller:
        volume = await controller.volume(context.app, id)
    if json:
        show(encode(volume).decode())
        return
    rows = [
        ["ID:", volume.id],
        ["State:", volume.state],
        ["HostID:", volume.host_id],
        ["AppID:", volume.app],
        ["ReleaseID:", volume.release],
        ["JobID:", volume.job or ""],
        ["JobType:", volume.job_type],
        ["CreatedAt:", moment(volume.created_at)],
        ["UpdatedAt:", moment(volume.updated_at)],
        ["DecommissionedAt:", moment(volume.decommissioned_at)],
    ]
    show(table(rows), end="")


async def decommission(context: Context, id: str) -> None:
    from flynn.types.volume import Volume

    async with context.controller() as controller:
        volume = await controller.decommission_volume(context.app, Volume(id=id))
    show(f"volume {volume.id} successfully decommissioned at {moment(volume.decommissioned_at)}")


NODES = {
    "deployment": tree(
        DEPLOYMENT,
        leaf(DEPLOYMENT, listing),
        timeout=leaf(DEPLOYMENT, timeout, argument("seconds", required=False, type=int)),
        batch_size=leaf(DEPLOYMENT, batch_size, argument("size", required=False, type=int)),
    ),
    "volume": tree(
        VOLUME,
        leaf(VOLUME, volumes),
        show=leaf(VOLUME, show_volume, flag("--json"), argument("id")),
        decommission=leaf(VOLUME, decommission, argument("id")),
    ),
}
