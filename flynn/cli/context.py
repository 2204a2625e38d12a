"""What a command works on: the configuration, the chosen cluster and app, a client. See spec/cli sections 3.2, 3.4."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flynn.cli import config as configuration
from flynn.cli import git
from flynn.cli.errors import CliError

if TYPE_CHECKING:
    from flynn.controller.client import Controller

AMBIGUOUS = (
    "error: Multiple apps listed in git remotes, please specify one with the global -a option to disambiguate.\n\n"
    "Available Flynn remotes:\n"
)


@dataclass
class Context:
    app_flag: str = ""  # -a
    cluster_flag: str = ""  # -c
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @cached_property
    def config(self) -> configuration.Config:
        return configuration.load(configuration.config_path(self.environ))

    @property
    def cluster_name(self) -> str:
        return self.cluster_flag or self.environ.get("FLYNN_CLUSTER", "")

    @property
    def _candidates(self) -> tuple[configuration.Cluster, ...]:
        name = self.cluster_name
        return tuple(cluster for cluster in self.config.clusters if not name or cluster.name == name)

    @cached_property
    def _remote(self) -> git.Remote | None:
        """The git remote that names app and cluster, if one does."""
        if self.app_flag:
            return git.named_remote(self.app_flag, self._candidates)
        if self.environ.get("FLYNN_APP"):
            return None
        configured = git.configured_remote(self._candidates)
        if configured is not None:
            return configured
        found = git.remotes(self._candidates)
        if found is None:
            raise CliError("no app found, run from a repo with a flynn remote or specify one with -a")
        if not found:
            raise CliError("no apps in git remotes")
        if len(found) > 1:
            raise CliError(AMBIGUOUS + "\n".join(sorted(remote.name for remote in found)))
        return found[0]

    @cached_property
    def app(self) -> str:
        """The app's name or id as the user gave it."""
        remote = self._remote
        if remote is not None:
            return remote.app
        return self.app_flag or self.environ["FLYNN_APP"]

    @cached_property
    def cluster(self) -> configuration.Cluster:
        """The cluster of the app's git remote if there is one, else the named, the default or the first one."""
        try:
            remote = self._remote
        except CliError:
            remote = None
        return remote.cluster if remote is not None else self.config.choose(self.cluster_name)

    def client_of(self, cluster: configuration.Cluster) -> Controller:
        import base64
        import binascii

        from flynn.controller.client import outside

        if cluster.oauth_url:
            raise CliError(f'cluster "{cluster.name}" uses OAuth, which is not supported any more; add it with its key')
        if cluster.tls_pin:
            try:
                base64.b64decode(cluster.tls_pin, validate=True)
            except binascii.Error as error:
                raise CliError(f"error decoding tls pin: {error}") from error
        return outside(cluster.controller_url, cluster.key, cluster.tls_pin or None)

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[Controller]:
        async with self.client_of(self.cluster) as client:
            yield client

    def ca_path(self, cluster: str) -> Path:
        return configuration.ca_path(self.environ, cluster)


def say(text: str) -> None:
    """A line about what happened, beside the data: on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Data: on standard output."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def ask(question: str) -> bool:
    """A question to be answered with yes or no."""
    sys.stdout.write(f"{question} (yes/no): ")
    sys.stdout.flush()
    while True:
        answer = sys.stdin.readline()
        if not answer:
            raise CliError("no answer to a question on standard input; use --yes to go ahead without asking")
        match answer.strip():
            case "y" | "yes":
                return True
            case "n" | "no":
                return False
        sys.stdout.write("Please type 'yes' or 'no': ")
        sys.stdout.flush()
