"""Pushes as users make them: real git, the real receiver, blobstore and build program."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from flynn.gitreceive.lease import LIFETIME, SILENCE
from flynn.gitreceive.release import Built
from flynn.http.client import HttpClient, KeyAuth
from flynn.identity import Identity
from flynn.types.codec import decode, encode, replace
from flynn.types.errors import ApiError
from flynn.types.formation import Formation
from flynn.types.host import HostJob
from flynn.types.release import ProcessType, Release
from tests.gitreceive.platform import Platform

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="builds drop from root to the slug's user"),
]

PROCFILE = "web: python3 -m http.server $PORT\nworker: true\n"


async def test_a_first_push_builds_releases_deploys_and_scales(platform: Platform) -> None:
    app = platform.add_app("shop")
    repository = await platform.repository("r", Procfile=PROCFILE, config__x="a directory named config")
    status, output = await platform.push(repository, "shop")
    assert status == 0, output
    lines = [line.removeprefix("remote: ") for line in output.splitlines()]
    expected = [
        "-----> Building shop...",
        "-----> Procfile app detected",
        "-----> Discovering process types",
        "       Procfile declares types -> web, worker",
        "-----> Uploading slug to blobstore",
        "-----> Creating release...",
        "=====> Scaling initial release to web=1",
        "-----> Waiting for initial web job to start...",
        "=====> Initial web job started",
        "=====> Application deployed",
        " * [new branch]      master -> master",
    ]
    positions = [lines.index(line) for line in expected]
    assert positions == sorted(positions)

    commit = await platform.git(repository, "rev-parse", "HEAD")
    release = platform.controller.current("shop")
    assert release.meta == {"git": "true", "git.commit": commit, "slugrunner.stack": "heroku-18"}
    web = release.processes["web"]
    assert web.args == ["/runner/init", "start", "web"]
    assert (web.service, web.ports[0].port, web.ports[0].service.name) == ("shop-web", 8080, "shop-web")  # type: ignore[union-attr]  # set
    assert release.processes["worker"] == ProcessType(args=["/runner/init", "start", "worker"])
    assert release.artifacts[0] == "runner"
    artifact = platform.controller.artifacts[release.artifacts[1]]
    (layer,) = artifact.image().layers()
    assert artifact.meta == {"blobstore": "true", "slugbuilder.process_types": "web,worker"}
    assert artifact.layer_url(layer) == f"https://blobstore.discoverd:80/slugs/layers/{layer.id}.squashfs"
    info = await platform.blobs.find(f"/slugs/layers/{layer.id}.squashfs")
    assert info is not None and (info.size, info.sha512_256) == (layer.length, layer.hashes["sha512_256"])
    assert await platform.blobs.children("/slugs/builds") == []
    assert await platform.blobs.find(f"/repos/{app.id}.tar") is not None
    assert await platform.blobs.find(f"/repos/{app.id}.lease") is None

    (job,) = platform.host.jobs.values()
    assert job.partition == "background" and job.metadata["flynn-controller.type"] == "slugbuilder"
    assert not any("controller-key" in value or "signing-key" in value for value in job.config.env.values())
    assert platform.host.stopped == []
    assert list((platform.directory / "tmp").iterdir()) == []


async def test_later_pushes_keep_counts_configuration_and_limits(platform: Platform) -> None:
    app = platform.add_app("shop")
    repository = await platform.repository("r", Procfile=PROCFILE)
    assert (await platform.push(repository, "shop"))[0] == 0
    first = platform.controller.current("shop")
    changed = replace(
        first,
        id="by-hand",
        env={"SECRET": "s", "BUILDPACK_URL": "procfile"},
        processes={**first.processes, "slugbuilder": ProcessType(), "gone": ProcessType()},
    )
    platform.controller.releases["by-hand"] = changed
    platform.controller.apps["shop"] = replace(platform.controller.apps["shop"], release="by-hand")
    platform.controller.formations[app.id, "by-hand"] = Formation(app=app.id, release="by-hand", processes={"web": 3})

    assert (await platform.push(repository, "shop"))[1].strip() == "Everything up-to-date"
    await platform.commit(repository, new="file")
    status, output = await platform.push(repository, "shop")
    assert status == 0, output
    assert "Fetching custom buildpack" in output and "Scaling initial release" not in output
    release = platform.controller.current("shop")
    assert release.env == changed.env
    assert sorted(release.processes) == ["slugbuilder", "web", "worker"]
    assert platform.controller.formations[app.id, release.id].processes == {"web": 3}

    clone = platform.directory / "clone"
    await platform.git(platform.directory, "clone", "--quiet", platform.remote("shop"), str(clone))
    assert (clone / "new").read_text() == "file"


async def test_a_failing_build_is_refused_with_its_own_words_and_changes_nothing(platform: Platform) -> None:
    platform.add_app("shop")
    repository = await platform.repository("r", Procfile=PROCFILE)
    assert (await platform.push(repository, "shop"))[0] == 0
    release = platform.controller.current("shop")
    await platform.commit(repository, Procfile="nonsense\n")
    status, output = await platform.push(repository, "shop")
    assert status == 1
    assert "remote: ERROR: Procfile line 1 is not '<type>: <command>': nonsense" in output
    assert "remote: ERROR: Build failed: exec: job exited with status 1" in output
    assert "! [remote rejected] master -> master (pre-receive hook declined)" in output
    assert platform.controller.current("shop") == release
    await platform.commit(repository, Procfile="web: true\n")
    assert (await platform.push(repository, "shop"))[0] == 0


async def test_a_failing_deployment_is_refused_with_its_reason(platform: Platform) -> None:
    platform.add_app("shop")
    platform.controller.deployment_error = "web job failed to start"
    repository = await platform.repository("r", Procfile=PROCFILE)
    status, output = await platform.push(repository, "shop")
    assert status == 1
    assert "remote: ERROR: Error deploying app release: web job failed to start" in output
    platform.controller.deployment_error = ""
    status, output = await platform.push(repository, "shop")
    assert status == 0, output


async def test_a_first_job_that_crashes_is_scaled_down_and_refused(platform: Platform) -> None:
    platform.add_app("shop")
    platform.controller.first_job_state = "down"
    repository = await platform.repository("r", Procfile=PROCFILE)
    status, output = await platform.push(repository, "shop")
    assert status == 1
    assert "-----> WARN: scaling initial release down to web=0 due to error" in output
    assert "remote: ERROR: Initial web job failed to start" in output
    assert platform.controller.formations == {}


async def test_only_master_is_deployed(platform: Platform) -> None:
    platform.add_app("shop")
    repository = await platform.repository("r", Procfile=PROCFILE)
    status, output = await platform.push(repository, "shop", "master:main")
    assert status == 1
    assert "remote: The push must include a change to the master branch to be deployed." in output
    assert (await platform.push(repository, "shop", "master", "master:other"))[0] == 0
    status, output = await platform.push(repository, "shop", ":master")
    assert status == 1
    assert "The master branch cannot be deleted" in output


async def test_wrong_keys_unknown_apps_and_odd_requests(platform: Platform) -> None:
    platform.add_app("shop")
    repository = await platform.repository("r", Procfile=PROCFILE)
    status, output = await platform.push(repository, "shop", key="wrong")
    assert status == 128 and "Authentication failed" in output
    status, output = await platform.push(repository, "nothing")
    assert status == 128 and "not found" in output
    identity = Identity.load(platform.directory / "router")
    async with HttpClient(platform.url, tls=identity, auth=KeyAuth(platform.key)) as http:
        for path, code in (
            ("/shop.git/HEAD", 403),
            ("/Shop!.git/info/refs", 403),
            ("/shop.git/info/refs", 404),
            ("/nothing.git/info/refs?service=git-upload-pack", 404),
        ):
            with pytest.raises(ApiError) as refusal:
                await http.get(path)
            assert refusal.value.status == code, path
        document = await http.call("GET", "/.well-known/status", answer=bytes)
        assert document is not None and b'"healthy"' in document
    async with HttpClient(platform.url, tls=identity) as nobody:
        with pytest.raises(ApiError, match="Authentication required"):
            await nobody.get("/shop.git/info/refs?service=git-upload-pack")


async def test_two_pushes_of_one_app_follow_one_another_and_both_arrive(platform: Platform) -> None:
    platform.add_app("shop")
    slow = "web: true\n"
    one = await platform.repository("one", Procfile=slow)
    assert (await platform.push(one, "shop"))[0] == 0
    two = platform.directory / "two"
    await platform.git(platform.directory, "clone", "--quiet", platform.remote("shop"), str(two))
    await platform.commit(one, a="a")
    await platform.commit(two, b="b")
    async with platform.pushing(one, "shop") as first:
        await first.until("-----> Building shop...")
        async with platform.pushing(two, "shop", "master", "master:topic") as second:
            await second.until("Another push of this app is running, waiting for it to finish...")
            assert (await first.end())[0] == 0
            status, output = await second.end()
    assert status == 1, output  # its parent is no longer the tip: git's own refusal
    clone = platform.directory / "clone"
    await platform.git(platform.directory, "clone", "--quiet", platform.remote("shop"), str(clone))
    assert (clone / "a").exists()
    await platform.git(two, "pull", "--quiet", "--rebase", platform.remote("shop"), "master")
    status, output = await platform.push(two, "shop")
    assert status == 0, output


async def test_a_cancelled_push_stops_the_build(platform: Platform, tmp_path: Path) -> None:
    repository = await with_a_slow_build(platform, tmp_path)
    async with platform.pushing(repository, "shop") as push:
        await push.until("       started")
        # As Ctrl-C; but a shell that runs in the background lets its children ignore that one.
        os.killpg(push.child.pid, signal.SIGTERM)
        async with asyncio.timeout(10):
            while not platform.host.stopped:
                await asyncio.sleep(0.05)
    assert platform.host.stopped == list(platform.host.jobs)
    async with asyncio.timeout(10):
        while await platform.blobs.find(f"/repos/{platform.controller.apps['shop'].id}.lease"):
            await asyncio.sleep(0.05)
    assert platform.controller.deploys == []


async def test_the_push_after_one_that_died_with_its_gitreceive_stops_its_build_and_goes_on_soon(
    platform: Platform, tmp_path: Path
) -> None:
    repository = await with_a_slow_build(platform, tmp_path)
    async with platform.another_gitreceive("host1-killed") as other:
        async with platform.pushing(repository, "shop", url=other.url) as push:
            await push.until("       started")
            other.kill()
            other.leave()
    platform.controller.apps["shop"] = replace(platform.controller.apps["shop"], release="")
    (stray,) = platform.host.jobs
    began = time.monotonic()
    await platform.commit(repository, Procfile=PROCFILE)
    await platform.git(repository, "rm", "--quiet", "requirements.txt", "runtime.txt", "setup.py")
    await platform.commit(repository)
    async with platform.pushing(repository, "shop") as push:
        await push.until("-----> Building shop...")
        assert time.monotonic() - began < LIFETIME.total_seconds() / 2
        assert platform.host.stopped == [stray]
        status, output = await push.end()
    assert status == 0, output
    assert platform.host.stopped == [stray]


async def test_a_gitreceive_that_has_left_the_directory_finishes_its_push(platform: Platform, tmp_path: Path) -> None:
    """So it is while it is replaced by another release."""
    repository = await with_a_slow_build(platform, tmp_path)
    async with platform.another_gitreceive("host1-leaving") as other:
        async with platform.pushing(repository, "shop", url=other.url) as push:
            await push.until("       started")
            other.leave()
            async with platform.pushing(repository, "shop") as second:
                await second.until("Another push of this app is running, waiting for it to finish...")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout((2 * SILENCE).total_seconds()):
                        await second.until("-----> Building shop...")
    assert len(platform.host.jobs) == 1


async def with_a_slow_build(platform: Platform, tmp_path: Path) -> Path:
    """Return a repository of the app `shop` whose build prints "started" and takes ten minutes."""
    platform.add_app("shop")
    repository = await platform.repository("r", **{"requirements.txt": "", "runtime.txt": "", "setup.py": ""})
    slow = tmp_path / "slow"
    (slow / "bin").mkdir(parents=True)
    for name in ("detect", "compile"):
        (slow / "bin" / name).write_text("#!/bin/bash\necho started\n" + ("sleep 600\n" if name == "compile" else ""))
        (slow / "bin" / name).chmod(0o755)
    await platform.git(slow, "init", "--quiet")
    await platform.commit(slow)
    for path in (slow, *slow.rglob("*")):
        os.chown(path, 5000, 5000)  # git refuses to read what belongs to somebody else
    previous = Release(id="0", app_id=platform.controller.apps["shop"].id, env={"BUILDPACK_URL": f"file://{slow}"})
    platform.controller.releases["0"] = previous
    platform.controller.apps["shop"] = replace(platform.controller.apps["shop"], release="0")
    return repository


async def test_a_build_that_lies_about_its_slug_is_refused(platform: Platform) -> None:
    platform.add_app("shop")
    repository = await platform.repository("r", Procfile="web: true\n")

    async def lie(job: HostJob) -> None:
        (name,) = (n for n in await platform.blobs.children("/slugs/builds") if n.endswith(".json"))
        truth = decode(await platform.blobs.read(name), Built)
        await platform.blobs.put(name, encode(replace(truth, sha512_256="../../repos/x")))

    platform.host.before_exit = lie
    status, output = await platform.push(repository, "shop")
    assert status == 1
    assert "remote: ERROR: Build failed: the slug in the blobstore is not the one the build describes" in output
    assert await platform.blobs.children("/slugs/layers") == []


async def test_large_pushes_pass(platform: Platform) -> None:
    platform.add_app("shop")
    repository = await platform.repository("r", Procfile="web: true\n")
    (repository / "blob").write_bytes(os.urandom(20 << 20))
    await platform.commit(repository)
    status, output = await platform.push(repository, "shop")
    assert status == 0, output


async def test_submodules_are_built(platform: Platform) -> None:
    platform.add_app("shop")
    inner = await platform.repository("inner", content="inside")
    repository = await platform.repository("r", Procfile="web: true\n", **{".slugignore": "nothing\n"})
    await platform.git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "sub")
    await platform.commit(repository)
    for _ in range(2):
        status, output = await platform.push(repository, "shop")
        assert status == 0, output
        sources = sorted((platform.directory / "jobs").iterdir(), key=lambda path: path.stat().st_mtime)
        assert (sources[-1] / "build/app/sub/content").read_text() == "inside"
        await platform.commit(repository, again="x")
