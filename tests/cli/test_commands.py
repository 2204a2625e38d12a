"""Commands against the real API: what is printed, to the byte where scripts depend on it."""

from __future__ import annotations

import asyncio
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flynn.controller.client import Controller
from flynn.types.formation import ScaleState
from flynn.types.job import Job
from tests.cli.conftest import User
from tests.controller.conftest import KEY, Shop, World

pytestmark = pytest.mark.slow  # every line is a process

UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def sh(user: User, *command: str, stdin: str = "") -> str:
    """Another program in the user's environment."""
    done = subprocess.run(command, env=user.env, cwd=user.home, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_create_list_and_errors(flynn: User) -> None:
    assert await flynn("create", "blog") == "Created blog\n"
    assert re.fullmatch(rf"ID {{36}}NAME\n{UUID}  blog\n", await flynn("apps"))
    assert (await flynn.fails("create", "blog")).startswith("object_exists: ")
    assert (await flynn.fails("create", "Not A Name")).startswith("validation_error: ")
    assert await flynn.fails("-a", "nosuch", "ps") == "controller: resource not found\n"
    assert await flynn.fails("ps") == "no app found, run from a repo with a flynn remote or specify one with -a\n"


async def test_create_makes_a_remote_in_a_repository(flynn: User) -> None:
    sh(flynn, "git", "init", "-q", ".")
    await flynn("create", "blog")
    await flynn("create", "-r", "other", "blog2")
    await flynn("create", "-r", "", "blog3")
    remotes = sh(flynn, "git", "remote", "-v")
    assert [line for line in remotes.splitlines() if "push" in line] == [
        "flynn\thttps://git.cluster.test/blog.git (push)",
        "other\thttps://git.cluster.test/blog2.git (push)",
    ]
    assert "already a git remote called flynn" in await flynn("create", "blog4", stdin="no\n")
    assert "blog4" not in await flynn("-a", "blog", "apps")
    assert await flynn("-a", "other", "info") == (
        "=== blog2\nGit URL:  https://git.cluster.test/blog2.git\nWeb URL:  http://blog2.cluster.test\n"
    )
    assert await flynn("-a", "blog3", "remote", "add", "third") == (
        "Created remote third with url https://git.cluster.test/blog3.git.\n"
    )


async def test_env(flynn: User, shop: Shop, controller: Controller) -> None:
    await controller.set_app_release(shop.app.id, shop.release.id)
    for arguments in (["env", "set", "B=2", "A=x=y"], ["env", "set", "-t", "web", "C=3"], ["env", "unset", "B"]):
        assert re.fullmatch(rf"Created release {UUID}\.\n", await flynn("-a", "shop", *arguments))
    assert await flynn("-a", "shop", "env") == "A=x=y\n"
    assert await flynn("-a", "shop", "env", "-t", "web") == "A=x=y\nC=3\n"
    assert await flynn("-a", "shop", "env", "get", "A") == "x=y\n"
    assert await flynn("-a", "shop", "env", "get", "-t", "web", "C") == "3\n"
    release = await controller.app_release("shop")
    assert await flynn.fails("-a", "shop", "env", "get", "B") == f'var "B" not found in release "{release.id}"\n'
    assert await flynn.fails("-a", "shop", "env", "set", "B") == 'invalid var format: "B"\n'
    assert release.processes["web"].args == ["web"]


async def test_env_without_any_release(flynn: User, controller: Controller) -> None:
    await flynn("create", "blog")
    assert await flynn("-a", "blog", "env") == ""
    assert await flynn.fails("-a", "blog", "env", "get", "A") == "no app release found\n"
    await flynn("-a", "blog", "env", "set", "A=1")
    assert await flynn("-a", "blog", "env") == "A=1\n"


async def test_meta_and_limits(flynn: User, shop: Shop, controller: Controller) -> None:
    await controller.set_app_release(shop.app.id, shop.release.id)
    await flynn("-a", "shop", "meta", "unset", *shop.app.meta)
    assert await flynn("-a", "shop", "meta", "set", "foo=bar", "baz=qux") == ""
    assert await flynn("-a", "shop", "meta") == "KEY  VALUE\nbaz  qux\nfoo  bar\n"
    await flynn("-a", "shop", "meta", "unset", "foo", "baz")
    assert await flynn("-a", "shop", "meta") == "KEY  VALUE\n"
    assert re.fullmatch(rf"Created release {UUID}\n", await flynn("-a", "shop", "limit", "set", "web", "memory=512MB"))
    assert await flynn("-a", "shop", "limit", "-t", "web") == (
        "web:  cpu=1000  max_fd=10000  memory=512MB  temp_disk=100MB\n"
    )


async def test_routes(flynn: User, shop: Shop) -> None:
    added = (await flynn("-a", "shop", "route", "add", "http", "--sticky", "shop.example.com")).strip()
    assert re.fullmatch(f"http/{UUID}", added)
    assert await flynn.fails("-a", "shop", "route", "add", "http", "shop.example.com") == "conflict: Duplicate route\n"
    sub = (await flynn("-a", "shop", "route", "add", "http", "-s", "api", "shop.example.com/api")).strip()
    tcp = await flynn("-a", "shop", "route", "add", "tcp", "--port", "9999")
    assert re.fullmatch(rf"tcp/{UUID} listening on port 9999\n", tcp)
    listing = await flynn("-a", "shop", "route")
    rows = {line.split()[2]: line.split() for line in listing.splitlines()[1:]}
    assert listing.splitlines()[0].split() == ["ROUTE", "SERVICE", "ID", "STICKY", "LEADER", "PATH"]
    assert rows[added] == ["http:shop.example.com", "shop-web", added, "true", "false", "/"]
    assert rows[sub] == ["http:shop.example.com", "api", sub, "false", "false", "/api/"]
    assert rows[tcp.split()[0]] == ["tcp:9999", "shop-web", tcp.split()[0], "false", "false"]
    assert await flynn("-a", "shop", "route", "update", added, "--no-sticky", "--leader") == f"updated {added}\n"
    assert f"{added}  false   true    /" in await flynn("-a", "shop", "route")
    assert await flynn("-a", "shop", "route", "remove", sub) == f"Route {sub} removed.\n"
    assert await flynn.fails("-a", "shop", "route", "remove", "udp/1") == "Route type udp not supported.\n"
    assert await flynn.fails("-a", "shop", "route", "add", "http", "-c", "/x", "a.test") == (
        "Both the TLS certificate AND private key need to be specified\n"
    )


async def test_releases(flynn: User, shop: Shop, controller: Controller) -> None:
    await controller.set_app_release(shop.app.id, shop.release.id)
    first = shop.release.id
    shown = await flynn("-a", "shop", "release", "show")
    assert shown.splitlines()[0] == f"ID:             {first}"
    assert shown.splitlines()[1:3] == [
        "Artifact[0]:    flynn+https://images.test/shop.json",
        "Process Types:  clock, web",
    ]
    assert (
        await flynn.fails("-a", "shop", "release", "rollback", "-y") == "Not enough releases to perform a rollback.\n"
    )
    update = flynn.home / "update.json"
    update.write_text('{"env":{"A":"1"},"processes":{"web":{"env":{"B":"2"}},"extra":{"args":["x"]}}}')
    created = await flynn("-a", "shop", "release", "update", str(update))
    second = created.split()[-1].rstrip(".")
    assert await flynn("-a", "shop", "release", "-q") == f"{second}\n{first}\n"
    release = await controller.release(second)
    assert release.env == {"A": "1"}
    assert (release.processes["web"].args, release.processes["web"].env) == (["web"], {"B": "2"})
    assert await flynn("-a", "shop", "release", "rollback", "--yes") == (
        f"Rolling back to release {first} from {second}.\nSuccessfully rolled back to release {first}.\n"
    )
    assert await flynn.fails("-a", "shop", "release", "rollback", first) == "Release id given is the current release.\n"
    assert await flynn.fails("-a", "shop", "release", "delete", "-y", first) == (
        "validation_error: cannot delete current app release\n"
    )


async def test_ps_and_kill(flynn: User, shop: Shop, controller: Controller) -> None:
    assert await flynn("-a", "shop", "ps") == "ID  TYPE  STATE  CREATED  RELEASE\n"
    for number, (type, state) in enumerate([("web", "up"), ("", "up"), ("web", "down"), ("clock", "starting")]):
        uuid = f"00000000-0000-4000-8000-00000000000{number}"
        await controller.put_job(
            Job(
                uuid=uuid,
                id=f"h1-{uuid}",
                host_id="h1",
                app=shop.app.id,
                release=shop.release.id,
                type=type,
                state=state,
                args=["run", "it"],
            )
        )
    lines = (await flynn("-a", "shop", "ps", "-c")).splitlines()
    assert [line.split()[1:3] for line in lines[1:]] == [["web", "up"], ["run", "up"]]
    assert all(line.endswith(f"{shop.release.id}  run it") for line in lines[1:])
    assert len((await flynn("-a", "shop", "ps", "--all", "-q")).splitlines()) == 4
    assert await flynn("-a", "shop", "ps", "-q", "-t", "run") == "h1-00000000-0000-4000-8000-000000000001\n"
    uuid = "00000000-0000-4000-8000-000000000009"
    await controller.put_job(
        Job(
            uuid=uuid, app=shop.app.id, release=shop.release.id, type="big", state="blocked", reason="no host is so big"
        )
    )
    _, row, why = (await flynn("-a", "shop", "ps", "-t", "big")).splitlines()
    assert row.split()[:3] == [uuid, "big", "blocked"]
    assert why == f"{uuid} (big) is blocked: no host is so big"
    assert await flynn("-a", "shop", "ps", "-q", "-t", "big") == f"{uuid}\n"
    killed = await flynn.fails("-a", "shop", "kill", "nosuch")
    assert killed == ("ERROR: could not kill job nosuch: controller: resource not found\nCould not kill all jobs.\n")


async def test_scale(flynn: User, shop: Shop, controller: Controller) -> None:
    await controller.set_app_release(shop.app.id, shop.release.id)
    assert await flynn("-a", "shop", "scale") == ""

    async def obey() -> None:
        """Be the scheduler: one job comes up, then the request is complete."""
        async for formation in controller.follow_formations():
            if formation.app is None or formation.release is None or formation.pending_scale_request is None:
                continue
            app, release = formation.app.id, formation.release.id
            await controller.put_job(
                Job(
                    uuid="00000000-0000-4000-8000-000000000009",
                    id="h1-00000000-0000-4000-8000-000000000009",
                    app=app,
                    release=release,
                    type="web",
                    state="up",
                    run_at=datetime.now(UTC),
                )
            )
            from flynn.types.codec import replace

            done = replace(formation.pending_scale_request, app=app, release=release, state=ScaleState.COMPLETE.value)
            await controller.put_scale_request(done)

    async with asyncio.TaskGroup() as group:
        scheduler = group.create_task(obey())
        out = await flynn("-a", "shop", "scale", "web=2", "clock=0")
        scheduler.cancel()
    assert re.fullmatch(
        r"scaling web: 0=>2\n\n"
        r"\d\d:\d\d:\d\d\.\d{3} ==> web h1-00000000-0000-4000-8000-000000000009 up\n"
        r"\nscale completed in [\d.]+m?s\n",
        out,
    )
    assert await flynn("-a", "shop", "scale") == "clock=0 web=2\n"
    assert await flynn("-a", "shop", "scale", "--all") == f"{shop.release.id} (current)\nweb=2\n"
    assert await flynn("-a", "shop", "scale", "-n", "web=3") == "scaling web: 2=>3\n\n"
    assert await flynn.fails("-a", "shop", "scale", "--timeout", "0.5", "web=4") == (
        "scaling web: 3=>4\n\ntimed out waiting for scale to complete (waited 0.5 seconds)\n"
    )
    assert await flynn.fails("-a", "shop", "scale", "nope=1") == 'ERROR: unknown process types: "nope"\n'


async def test_providers_and_databases(flynn: User, shop: Shop, controller: Controller) -> None:
    assert await flynn("provider") == ""
    assert await flynn("provider", "add", "postgres", "https://x.test/databases") == "Created provider postgres.\n"
    assert (await flynn("provider")).splitlines()[0].split() == ["ID", "NAME", "URL"]
    assert await flynn("-a", "shop", "resource") == "ID  Provider ID  Provider Name\n"
    assert "postgres" in [provider.name for provider in await controller.providers()]
    assert await flynn.fails("-a", "shop", "pg", "psql") == (
        "error getting app release: controller: resource not found\n"
    )
    await controller.set_app_release(shop.app.id, shop.release.id)
    assert await flynn.fails("-a", "shop", "pg", "dump") == (
        "No postgres database found. Provision one with `flynn resource add postgres`\n"
    )


async def test_deployments_and_volumes(flynn: User, shop: Shop) -> None:
    assert await flynn("-a", "shop", "deployment") == "ID  STATUS  CREATED  FINISHED\n"
    assert await flynn("-a", "shop", "deployment", "timeout") == "120\n"
    assert await flynn("-a", "shop", "deployment", "timeout", "30") == ""
    assert await flynn("-a", "shop", "deployment", "timeout") == "30\n"
    assert await flynn("-a", "shop", "deployment", "batch-size") == "not set\n"
    await flynn("-a", "shop", "deployment", "batch-size", "4")
    assert await flynn("-a", "shop", "deployment", "batch-size") == "4\n"
    assert await flynn("-a", "shop", "volume") == "ID  HOST  STATE  ATTACHED JOB  CREATED  DECOMMISSIONED\n"


async def test_a_wrong_key_or_pin_or_address(flynn: User) -> None:
    flynn.knows(Key="wrong")
    assert await flynn.fails("apps") == "unauthorized: the cluster does not accept this key\n"
    flynn.knows(TLSPin="q83vEjRWeJA0VniQEjRWeJASNFZ4kBI0VniQEjRWeJA=")
    assert "does not match the pin" in await flynn.fails("apps")
    flynn.knows(TLSPin="not base64!")
    assert (await flynn.fails("apps")).startswith("error decoding tls pin: ")
    flynn.knows(OAuthURL="https://login.test")
    assert "OAuth" in await flynn.fails("apps")


async def test_clusters(flynn: User, world: World) -> None:
    (flynn.home / "flynnrc").unlink()
    assert await flynn("cluster") == "NAME  CONTROLLER URL  GIT URL  IMAGE URL\n"
    assert await flynn.fails("apps") == "no clusters configured\n"
    added = await flynn("cluster", "add", "--no-git", "one", "https://controller.a.test", KEY)
    assert added == 'Cluster "one" added and set as default.\n'
    assert await flynn("cluster", "add", "--no-git", "-p", "cGlu", "two", "b.test", KEY) == 'Cluster "two" added.\n'
    assert await flynn.fails("cluster", "add", "--no-git", "two", "c.test", KEY) == (
        'Cluster "two" already exists in ~/.flynnrc\n'
    )
    assert await flynn("cluster") == (
        "NAME  CONTROLLER URL             GIT URL  IMAGE URL\n"
        "one   https://controller.a.test  (none)   https://images.a.test  (default)\n"
        "two   https://controller.b.test  (none)   https://images.b.test\n"
    )
    assert await flynn("cluster", "default", "two") == '"two" is now the default cluster.\n'
    assert await flynn("cluster", "default") == "NAME  URL\ntwo   https://controller.b.test  (default)\n"
    assert await flynn("cluster", "remove", "two") == ('Cluster "two" removed and "one" is now the default cluster.\n')
    assert await flynn("cluster", "remove", "two") == ""


async def test_git_is_set_up_for_a_cluster(flynn: User, tmp_path: Path) -> None:
    from flynn.cli import config, git

    cluster = config.cluster_at("a.test", "one", KEY, "")
    script = (
        "import sys; from pathlib import Path; from flynn.cli import config, git; sys.argv[0] = 'flynn';"
        f"git.set_up(config.cluster_at('a.test', 'one', 'k', ''), Path('{tmp_path}/ca.pem'))"
    )
    sh(flynn, "python", "-c", script)
    listed = sh(flynn, "git", "config", "--global", "-l")
    assert f"http.{cluster.git_url}.sslcainfo={tmp_path}/ca.pem" in listed
    assert re.search(rf"credential\.{re.escape(cluster.git_url)}\.helper=/\S+/flynn git-credentials\n", listed)
    flynn.knows(GitURL="https://git.a.test")
    filled = sh(flynn, "git", "credential", "fill", stdin="protocol=https\nhost=git.a.test\n\n")
    assert f"password={KEY}\n" in filled
    assert git.credentials([], "") == ""


async def test_usage_and_help(flynn: User) -> None:
    assert await flynn.fails("nosuch") == "nosuch is not a flynn command. See 'flynn help'\n"
    assert await flynn.fails("help", "nosuch") == "nosuch is not a flynn command. See 'flynn help'\n"
    assert await flynn.fails("ps", "stray") == "usage: flynn ps [-a] [-c] [-q] [-t <type>]\n"
    assert await flynn.fails() == "usage: flynn [-a <app>] [-c <cluster>] <command> [<args>...]\n"
    assert await flynn("help", "ps") == await flynn("ps", "--help")
    assert await flynn("version") == "dev\n"
    assert '"git-credentials": "usage:' in await flynn("help", "--json")
