"""What users do, through the doors they use: the `flynn` client, git, curl."""

from __future__ import annotations

import pty
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.cluster.lab.user import User, eventually

pytestmark = pytest.mark.cluster


def test_a_python_app_with_dependencies(user: User, shop: Path) -> None:
    assert user.get(user.url("shop"))[0] == 200
    assert user.get(user.url("shop", "https"), "-k")[0] == 200


def test_the_site_verifies_against_the_cluster_authority(user: User, shop: Path) -> None:
    user.run("curl", "-sk", "-o", "ca.pem", f"https://controller.{user.domain}/ca-cert")
    status, _ = user.get(user.url("shop", "https"), "--cacert", "ca.pem")
    assert status == 200


def test_http2(user: User, shop: Path) -> None:
    done = user.run("curl", "-sk", "--http2", "-o", "/dev/null", "-w", "%{http_version}", user.url("shop", "https"))
    assert done.stdout == "2"


def test_a_node_app_with_dependencies(user: User) -> None:
    pushed = user.push(user.app("blog", "node"))
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    eventually(lambda: user.get(user.url("blog"))[0] == 200)


def test_a_static_site(user: User) -> None:
    pushed = user.push(user.app("site", "static"))
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    eventually(lambda: "Hello from a static site" in user.get(user.url("site"))[1])


def test_a_second_push_uses_the_cache(user: User, shop: Path) -> None:
    user.commit(shop, "nothing new")
    began = time.monotonic()
    pushed = user.push(shop)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert time.monotonic() - began < 60
    assert "Using cached" in pushed.stderr or "cache" in pushed.stderr.lower()


def test_a_broken_push_is_refused_and_leaves_the_running_release_alone(user: User, shop: Path) -> None:
    before = user.flynn("-a", "shop", "release", "-q")
    (shop / "requirements.txt").write_text("no-such-package-anywhere==99.99\n")
    user.commit(shop, "break it")
    pushed = user.push(shop)
    assert pushed.returncode != 0
    assert "no-such-package-anywhere" in pushed.stderr
    assert "pre-receive hook declined" in pushed.stderr
    assert user.flynn("-a", "shop", "release", "-q") == before
    assert user.get(user.url("shop"))[0] == 200
    user.git(shop, "reset", "-q", "--hard", "HEAD~1")


def test_a_push_to_an_unknown_app(user: User, shop: Path) -> None:
    done = user.run("git", "push", f"https://git.{user.domain}/nosuch.git", "master", cwd=shop)
    assert done.returncode != 0
    assert "not found" in done.stderr or "unknown app" in done.stderr


def test_scale_and_ps(user: User, shop: Path) -> None:
    out = user.flynn("-a", "shop", "scale", "web=3")
    assert "web: 1=>3" in out
    assert "scale completed in" in out
    rows = [line.split() for line in user.flynn("-a", "shop", "ps").splitlines()[1:]]
    assert [row[1:3] for row in rows] == [["web", "up"]] * 3
    user.flynn("-a", "shop", "scale", "web=2")
    assert len(user.flynn("-a", "shop", "ps", "-q").split()) == 2


def test_logs_follow(user: User, shop: Path) -> None:
    follower = subprocess.Popen(
        ["flynn", "-a", "shop", "log", "-f", "-n", "0"], env=user.env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert follower.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(iter(follower.stdout.readline, "")), daemon=True)  # type: ignore[union-attr]
        reader.start()

        def seen() -> bool:
            user.get(user.url("shop") + "marked-request")
            return any("marked-request" in line for line in lines)

        eventually(seen, 30)
    finally:
        follower.terminate()
        follower.wait(10)


def test_run_gives_the_exit_status_and_the_streams(user: User, shop: Path) -> None:
    done = user.run("flynn", "-a", "shop", "run", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_run_passes_standard_input_and_its_end(user: User, shop: Path) -> None:
    done = user.run("flynn", "-a", "shop", "run", "cat", stdin="one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")


def test_run_with_a_terminal(user: User, shop: Path) -> None:
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        ["flynn", "-a", "shop", "run", "bash"], env=user.env | {"TERM": "xterm"},
        stdin=secondary, stdout=secondary, stderr=secondary, close_fds=True,
    )  # fmt: skip
    import os

    os.close(secondary)
    output = b""

    def read() -> None:
        nonlocal output
        try:
            while data := os.read(primary, 4096):
                output += data
        except OSError:
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        eventually(lambda: b"$" in output or b"#" in output, 30)
        os.write(primary, b"tty && echo answer $((6*7))\n")
        eventually(lambda: b"answer 42" in output and b"/dev/pts/" in output, 20)
        os.write(primary, b"exit 3\n")
        assert process.wait(30) == 3
    finally:
        process.kill()
        process.wait()
        os.close(primary)


class Load:
    """Asks for a URL over and over in the background and counts what failed."""

    def __init__(self, user: User, url: str) -> None:
        self._user, self._url = user, url
        self._end = threading.Event()
        self.asked = 0
        self.failed: list[object] = []

    def __enter__(self) -> Load:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        eventually(lambda: self.asked > 3, 20)
        return self

    def _run(self) -> None:
        while not self._end.is_set():
            answer = self._user.get(self._url)
            self.asked += 1
            if answer[0] != 200:
                self.failed.append(answer)

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(30)


def test_a_change_of_the_environment_fails_no_request(user: User, shop: Path) -> None:
    with Load(user, user.url("shop")) as load:
        user.flynn("-a", "shop", "env", "set", "COLOUR=blue")
        eventually(lambda: load.asked > 30, 30)
    assert load.failed == []
    assert "COLOUR=blue" in user.flynn("-a", "shop", "env")
    assert user.run("flynn", "-a", "shop", "run", "sh", "-c", "echo $COLOUR").stdout == "blue\n"


def test_a_database(user: User, shop: Path) -> None:
    user.flynn("-a", "shop", "resource", "add", "postgres")
    assert "DATABASE_URL=postgres://" in user.flynn("-a", "shop", "env")
    done = user.run("flynn", "-a", "shop", "pg", "psql", "--", "-c", "SELECT 40 + 2 AS answer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "42" in done.stdout


def test_a_route(user: User, shop: Path) -> None:
    user.flynn("-a", "shop", "route", "add", "http", f"other.{user.domain}")
    eventually(lambda: user.get(user.url("other"))[0] == 200, 20)
    assert f"other.{user.domain}" in user.flynn("-a", "shop", "route")


def test_nobody_there(user: User) -> None:
    status, _ = user.get(f"http://{user.env['NODE_IPS'].split(',')[0]}/", "-H", "Host: nothing.example.com")
    assert status == 404


def test_deletion(user: User) -> None:
    user.run("flynn", "create", "--yes", "-r", "", "broken")
    assert "broken" in user.flynn("apps")
    assert "Deleted broken" in user.flynn("-a", "broken", "delete", "--yes")
    assert "broken" not in user.flynn("apps")
