"""git as this client needs it: remotes that name an app, and the set-up that lets `git push` reach a cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flynn.cli.config import Cluster
from flynn.cli.errors import CliError

DEFAULT_REMOTE = "flynn"


@dataclass(frozen=True, slots=True)
class Remote:
    """A git remote that belongs to an app of a known cluster."""

    name: str
    url: str
    app: str
    cluster: Cluster


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return subprocess.CompletedProcess(["git", *arguments], 127, "", "git was not found")


def match(name: str, url: str, clusters: Sequence[Cluster]) -> Remote | None:
    """The first cluster whose git address the URL begins with."""
    for cluster in clusters:
        prefix = f"{cluster.git_url}/"
        if cluster.git_url and url.startswith(prefix) and url.endswith(".git"):
            return Remote(name, url, url.removeprefix(prefix).removesuffix(".git"), cluster)
    return None


def in_repository() -> bool:
    return _git("rev-parse", "--git-dir").returncode == 0


def remote_url(name: str) -> str | None:
    done = _git("config", f"remote.{name}.url")
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def remote_names() -> list[str]:
    return _git("remote").stdout.split()


def named_remote(name: str, clusters: Sequence[Cluster]) -> Remote | None:
    url = remote_url(name) if name and not name.startswith("-") else None
    return match(name, url, clusters) if url else None


def configured_remote(clusters: Sequence[Cluster]) -> Remote | None:
    """The remote that the repository's `flynn.remote` setting names."""
    done = _git("config", "flynn.remote")
    name = done.stdout.strip()
    if done.returncode != 0 or not name:
        return None
    url = remote_url(name)
    if url is None:
        raise CliError(f"could not find git remote {name} in {os.getcwd()}")
    found = match(name, url, clusters)
    if found is None:
        raise CliError(f"could not find app name in {name} git remote")
    return found


def remotes(clusters: Sequence[Cluster]) -> list[Remote] | None:
    """All remotes that are apps of known clusters; None outside of a repository."""
    done = _git("remote", "-v")
    if done.returncode != 0:
        return None
    found: dict[str, Remote] = {}
    for line in done.stdout.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2] == "(push)":
            remote = match(fields[0], fields[1], clusters)
            if remote is not None:
                found[remote.name] = remote
    return list(found.values())


def url_of(cluster: Cluster, app: str) -> str:
    return f"{cluster.git_url}/{app}.git"


def replace_remote(name: str, url: str) -> None:
    if name in remote_names():
        _git("remote", "remove", name)
    _git("remote", "add", "--", name, url)


def remove_remote(name: str) -> None:
    _git("remote", "remove", name)


def require_git() -> None:
    if shutil.which("git") is None:
        raise CliError("Executable 'git' was not found. Use --no-git to skip git configuration")


def set_up(cluster: Cluster, ca_file: Path | None) -> None:
    """Let git trust the cluster's certificates, and ask this program for the password."""
    if ca_file is not None:
        _configure(f"http.{cluster.git_url}.sslCAInfo", str(ca_file))
        # GIT_SSL_CAINFO in a user's environment overrules the line above, but not this one.
        _configure(f"http.{cluster.git_url}.sslCAPath", str(ca_file.parent))
    _configure(f"credential.{cluster.git_url}.helper", f"{shlex.quote(own_path())} git-credentials")


def _configure(key: str, value: str) -> None:
    done = _git("config", "--global", key, value)
    if done.returncode != 0:
        raise CliError(f"git config {key} failed: {done.stderr.strip()}")


def tear_down(cluster: Cluster) -> None:
    for section in (f"http.{cluster.git_url}", f"credential.{cluster.git_url}"):
        _git("config", "--global", "--remove-section", section)


def own_path() -> str:
    """The absolute path of the program that is running, for git to call it later."""
    given = shutil.which(sys.argv[0]) or sys.argv[0]
    return os.path.abspath(given)


def credentials(clusters: Sequence[Cluster], request: str) -> str:
    """Answer git's `get`; nothing for hosts that are not a cluster's."""
    asked = dict(line.split("=", 1) for line in request.splitlines() if "=" in line)
    if asked.get("protocol") != "https":
        return ""
    host = asked.get("host", "")
    for cluster in clusters:
        if cluster.git_url == f"https://{host}" and cluster.key:
            return f"protocol=https\nusername=user\nhost={host}\npassword={cluster.key}\n"
    return ""
