"""Whole builds of the sample apps: the program as a job runs it, real pip and npm, a real blobstore."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from flynn.slugbuilder.settings import ENV_DIR_COOKIE
from tests.slugbuilder.conftest import Store

REPOSITORY = Path(__file__).parents[2]
APPS = REPOSITORY / "tests" / "apps"

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="builds drop from root to the slug's user"),
]


needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine; the image has it")


@dataclass
class Outcome:
    status: int
    output: str  # as a terminal would have it: without the cursor movements
    errors: str
    root: Path  # the slug, unpacked
    result: dict[str, object]


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, cwd=cwd, env=env).stdout


class Builder:
    """Builds the same app again and again, with its cache in the store."""

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._count = 0

    async def build(self, source: bytes, env: dict[str, str] | None = None, **job_env: str) -> Outcome:
        self._count += 1
        place = self._directory / f"build{self._count}"
        place.mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(place),
            "APP_LINK": str(place / "link"),
            "BUILDPACKS_DIR": str(REPOSITORY / "buildpacks"),
            "SLUG_PUT_URL": self._store.signed("PUT", f"/slugs/{self._count}.squashfs"),
            "RESULT_PUT_URL": self._store.signed("PUT", f"/slugs/{self._count}.json"),
            "BUILD_CACHE_GET_URL": self._store.signed("GET", "/app-cache.tgz"),
            "BUILD_CACHE_PUT_URL": self._store.signed("PUT", "/app-cache.tgz"),
            "BLOBSTORE_CA": self._store.ca_pem,
            "STACK": "heroku-18",
            "SOURCE_VERSION": "c0ffee",
            **job_env,
        }
        child = await asyncio.create_subprocess_exec(
            "/usr/bin/python3",  # what the image has: nothing but the standard library
            "-m",
            "flynn.slugbuilder.main",
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(180):
            output, errors = await child.communicate(source + (archive(configuration(env)) if env else b""))
        assert child.returncode is not None
        result: dict[str, object] = {}
        if child.returncode == 0:
            blob = f"/slugs/{self._count}.squashfs"
            slug = place / "fetched"
            async with self._store.blobs.open(blob) as (info, chunks):
                slug.write_bytes(b"".join([chunk async for chunk in chunks]))
            result = json.loads(await self._store.blobs.read(f"/slugs/{self._count}.json"))
            assert (result["sha512_256"], result["length"]) == (info.sha512_256, info.size)
            run("unsquashfs", "-q", "-n", "-d", place / "slug", slug)
        return Outcome(
            child.returncode,
            output.decode().replace("\x1b[1G", ""),
            errors.decode(),
            place / "slug",
            result,
        )


@pytest.fixture
async def builder(store: Store, tmp_path: Path) -> AsyncIterator[Builder]:
    # The slug's user must be able to reach its own directories.
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest-") or parent == tmp_path:
            parent.chmod(0o755)
    yield Builder(store, tmp_path)


def archive(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def configuration(env: dict[str, str]) -> dict[str, tuple[bytes, int]]:
    return {f"{ENV_DIR_COOKIE}/{name}": (value.encode(), 0o644) for name, value in env.items()}


def files(**content: str) -> bytes:
    return archive({name: (text.encode(), 0o644) for name, text in content.items()})


def directory(path: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(path, arcname=".")
    return buffer.getvalue()


def buildpack(path: Path, **programs: str) -> str:
    """A git repository that holds a buildpack; returns its URL."""
    (path / "bin").mkdir(parents=True)
    for name, text in programs.items():
        program = path / "bin" / name
        program.write_text("#!/bin/bash\n" + text)
        program.chmod(0o755)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        run("git", "-c", "user.name=t", "-c", "user.email=t@t", *command, cwd=path)
    run("chown", "-R", "5000:5000", path)  # git refuses to read what belongs to somebody else
    return f"file://{path}"


@contextmanager
def running(outcome: Outcome, *arguments: str) -> Iterator[int]:
    """A process type of the slug, started by the runner in a chroot-like place; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-m", "flynn.slugbuilder.runner", *arguments],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "APP_DIR": str(outcome.root / "app"),
            "PORT": str(port),
        },
        start_new_session=True,
    )
    try:
        yield port
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


async def fetch(port: int, path: str = "/") -> str:
    def once() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return f"{answer.status} {answer.read().decode()}"
        finally:
            connection.close()

    async with asyncio.timeout(15):
        while True:
            try:
                return await asyncio.to_thread(once)
            except ConnectionError:
                await asyncio.sleep(0.05)


async def test_python(builder: Builder) -> None:
    first = await builder.build(directory(APPS / "python"))
    assert first.status == 0, first.output + first.errors
    assert "-----> Deleting 1 files matching .slugignore patterns.\n-----> Python app detected\n" in first.output
    assert "Installing requirements with pip" in first.output
    assert "Procfile declares types -> web, clock\n" in first.output
    assert re.search(r"-----> Compiled slug size is [\d.]+ [KM]iB\n$", first.output)
    assert first.result["process_types"] == {
        "clock": "while true; do date; sleep 5; done",
        "web": "gunicorn --bind 0.0.0.0:$PORT --workers 1 --threads 4 --access-logfile - app:app",
    }
    app = first.root / "app"
    assert not (app / "NOTES.txt").exists()
    assert (app / ".heroku/python/bin/gunicorn").read_text().startswith("#!/app/.heroku/python/bin/python")
    assert (app / "app.py").stat().st_uid == 5000
    assert "flynn:x:5000:" in (first.root / "etc/passwd").read_text()

    again = await builder.build(directory(APPS / "python"))
    assert again.status == 0, again.output + again.errors
    assert "Restoring installed requirements from cache" in again.output
    assert (again.root / "app/.heroku/python/bin/gunicorn").read_bytes() == (
        app / ".heroku/python/bin/gunicorn"
    ).read_bytes()


@needs_npm
async def test_node(builder: Builder) -> None:
    first = await builder.build(directory(APPS / "node"))
    assert first.status == 0, first.output + first.errors
    assert "-----> Node.js app detected\n" in first.output
    assert "Default process types for Node.js -> web\n" in first.output
    assert first.result["process_types"] == {"web": "npm start"}
    with running(first, "start", "web") as port:
        assert (await fetch(port)).startswith("200 Hello from Node, up for ")
    again = await builder.build(directory(APPS / "node"))
    assert "Restoring node modules from cache" in again.output
    assert (again.root / "app/node_modules/ms/index.js").exists()


@needs_npm
async def test_node_build_script_sees_development_modules_and_the_slug_does_not(builder: Builder) -> None:
    package = {
        "scripts": {"build": "node -e \"fs.writeFileSync('built', require('ms')('1m') + process.env.CONFIGURED)\""},
        "devDependencies": {"ms": "2.1.3"},
    }
    outcome = await builder.build(files(**{"package.json": json.dumps(package)}), env={"CONFIGURED": "!"})
    assert outcome.status == 0, outcome.output + outcome.errors
    assert (outcome.root / "app/built").read_text() == "60000!"
    assert not (outcome.root / "app/node_modules/ms").exists()
    assert outcome.result["process_types"] == {}


async def test_static(builder: Builder) -> None:
    outcome = await builder.build(directory(APPS / "static"))
    assert outcome.status == 0, outcome.output + outcome.errors
    assert "-----> Static site app detected\n" in outcome.output
    assert outcome.result["process_types"] == {"web": ".heroku/static/boot"}
    assert "listen @PORT@;" in (outcome.root / "app/.heroku/static/nginx.conf").read_text()


async def test_procfile_only(builder: Builder) -> None:
    outcome = await builder.build(files(Procfile="web: python3 -m http.server $PORT\n", hello="hi"))
    assert outcome.status == 0, outcome.output + outcome.errors
    with running(outcome, "start", "web") as port:
        assert await fetch(port, "/hello") == "200 hi"


async def test_a_requirement_that_does_not_exist_fails_with_pips_own_words(builder: Builder) -> None:
    outcome = await builder.build(directory(APPS / "broken"))
    assert outcome.status == 1
    assert "flynn-no-such-package-at-all" in outcome.errors
    assert "Uploading" not in outcome.output


async def test_what_nothing_recognises_is_refused(builder: Builder) -> None:
    outcome = await builder.build(files(readme="hello"))
    assert (outcome.status, outcome.output) == (1, "-----> Unable to select a buildpack\n")


async def test_a_malformed_procfile_is_refused_by_line(builder: Builder) -> None:
    outcome = await builder.build(files(Procfile="nonsense\n"))
    assert outcome.status == 1
    assert "ERROR: Procfile line 1" in outcome.errors


async def test_custom_buildpack_with_cache_and_configuration(builder: Builder, tmp_path: Path) -> None:
    url = buildpack(
        tmp_path / "heroku-buildpack-test",
        detect="echo Test",
        compile="""
            echo "-----> args $# source $SOURCE_VERSION stack $STACK"
            echo "cached: $(cat $2/count 2>/dev/null)"
            echo "secret: $(cat $3/SECRET)"
            echo "urls: $SLUG_PUT_URL"
            echo "user: $(id -u)"
            echo $(( $(cat $2/count 2>/dev/null || echo -1) + 1 )) > $2/count
            mkdir -p $2/dir; touch $2/dir/program; chmod 755 $2/dir/program
            mkdir $1/.profile.d; echo 'export GREETING=hello' > $1/.profile.d/x.sh
        """,
        release="printf -- '---\\nconfig_vars:\\n  A: b\\ndefault_process_types:\\n  web: echo $GREETING $A\\n'",
    )
    for cached in ("", "0", "1"):
        outcome = await builder.build(
            files(x="y"), env={"SECRET": "s3cret", "HTTP_PROXY": ""}, BUILDPACK_URL=url + "#v1"
        )
        assert outcome.status == 0, outcome.output + outcome.errors
        assert (
            "-----> Fetching custom buildpack\n-----> Test app detected\n"
            "-----> args 3 source c0ffee stack heroku-18\n"
            f"       cached: {cached}".rstrip(" ")
            + "\n       secret: s3cret\n       urls:\n       user: 5000\n"
        ) in outcome.output
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "APP_DIR": str(outcome.root / "app")}
    runner = (sys.executable, "-m", "flynn.slugbuilder.runner", "start", "web")
    assert run(*runner, env=environment) == b"hello b\n"


async def test_custom_buildpack_that_cannot_be_fetched_shows_why(builder: Builder) -> None:
    outcome = await builder.build(files(x="y"), BUILDPACK_URL="file:///nowhere/at/all")
    assert outcome.status == 128
    assert "/nowhere/at/all" in outcome.errors and "could not fetch the buildpack" in outcome.errors


@needs_npm
async def test_several_buildpacks(builder: Builder, tmp_path: Path) -> None:
    url = buildpack(
        tmp_path / "pack",
        detect="echo Pack",
        compile="echo packed; echo 'export NPM_CONFIG_MARK=1' > ${0%/bin/*}/export",
        release="",
    )
    outcome = await builder.build(
        files(**{".buildpacks": f"{url}\nheroku/nodejs\n", "package.json": '{"scripts": {"start": "true"}}'})
    )
    assert outcome.status == 0, outcome.output + outcome.errors
    assert "-----> Multipack app detected\n" in outcome.output
    assert "=====> Detected Framework: Pack\n       packed\n" in outcome.output
    assert "=====> Detected Framework: Node.js\n" in outcome.output
    assert outcome.result["process_types"] == {"web": "npm start"}


async def test_an_empty_list_of_buildpacks_builds_nothing(builder: Builder) -> None:
    outcome = await builder.build(files(**{".buildpacks": "", "hello": "hi"}))
    assert outcome.status == 0, outcome.output + outcome.errors
    assert outcome.result["process_types"] == {}
    assert (outcome.root / "app/hello").read_text() == "hi"


async def test_a_store_that_refuses_the_slug_fails_the_build_after_three_attempts(
    builder: Builder, store: Store
) -> None:
    outcome = await builder.build(files(Procfile="a: b"), SLUG_PUT_URL=store.url + "/slugs/x?expires=1&signature=0")
    assert outcome.status == 1
    assert outcome.output.count("WARN: error uploading to blobstore (attempt ") == 3
    assert "ERROR: could not create slug image: HTTP Error 403" in outcome.errors
