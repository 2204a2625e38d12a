"""The main job, as a new user would do it: create an app, push it with git, ask for it, scale it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from tests.cluster.lab import hosts_file
from tests.cluster.lab.cluster import PUBLISHED, Phases, environment, flynn, wait_for
from tests.cluster.lab.layout import REPO, Node, names

APP = "hello"
SAMPLE = REPO / "tests" / "apps" / "python"


def demo() -> None:
    env = environment()
    domain = env["CLUSTER_DOMAIN"]
    hosts_file.publish(Node(0).ip, names(domain, (APP,)))
    phases = Phases()
    work = Path(tempfile.mkdtemp(prefix="flynn-demo-"))
    try:
        with phases.phase("create the app"):
            shutil.copytree(SAMPLE, work / APP)
            git(work / APP, env, "init", "-q", "-b", "master")
            git(work / APP, env, "add", "-A")
            git(work / APP, env, "-c", "user.name=demo", "-c", "user.email=demo@example.com", "commit", "-qm", "hello")
            flynn("create", "--yes", APP, cwd=str(work / APP))
        with phases.phase("git push flynn master"):
            git(work / APP, env, "push", "flynn", "master")
        with phases.phase("ask for it over HTTP and HTTPS"):
            wait_for("the app over HTTP", lambda: bool(ask(f"http://{APP}.{domain}/")), 30)
            print(ask(f"http://{APP}.{domain}/"))
            print(ask(f"https://{APP}.{domain}/", authority(env)))
        with phases.phase("scale to three"):
            flynn("-a", APP, "scale", "web=3")
            flynn("-a", APP, "ps")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(phases.table())
    print(f"The app is at http://{APP}.{domain}/ and https://{APP}.{domain}/")


def git(directory: Path, env: dict[str, str], *arguments: str) -> None:
    subprocess.run(["git", "-C", str(directory), *arguments], env=env, check=True, timeout=900)


def ask(url: str, context: ssl.SSLContext | None = None) -> str:
    """The body of a GET that must be answered 200."""
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        text: str = answer.read().decode()
    return text


def authority(env: dict[str, str]) -> ssl.SSLContext:
    """Trust in the cluster's own authority, fetched from the controller."""
    unverified = ssl._create_unverified_context()
    with urllib.request.urlopen(
        f"https://controller.{env['CLUSTER_DOMAIN']}/ca-cert", timeout=10, context=unverified
    ) as answer:
        pem = answer.read().decode()
    (PUBLISHED / "ca.pem").write_text(pem)
    return ssl.create_default_context(cadata=pem)
