"""`~/.flynnrc`, and which app and cluster a command works on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pytest import param

from flynn.cli import config, git
from flynn.cli.config import Cluster, Config
from flynn.cli.context import Context
from flynn.cli.errors import CliError

FILE = """default = "prod"

[[cluster]]
  Name = "prod"
  Key = "3f0c9a"
  TLSPin = "q83vEjRWeJA0VniQEjRWeJASNFZ4kBI0VniQEjRWeJA="
  ControllerURL = "https://controller.paas.example"
  GitURL = "https://git.paas.example"
  ImageURL = "https://images.paas.example"

[[cluster]]
  Name = "test"
  ControllerURL = "http://controller.test"
  GitURL = ""
  ImageURL = ""
"""

PROD = config.cluster_at("paas.example", "prod", "3f0c9a", "q83vEjRWeJA0VniQEjRWeJASNFZ4kBI0VniQEjRWeJA=")
TEST = Cluster(name="test", controller_url="http://controller.test")


def test_the_file_is_read_and_written_as_the_original_does(tmp_path: Path) -> None:
    path = tmp_path / "flynnrc"
    path.write_text(FILE)
    loaded = config.load(path)
    assert loaded == Config("prod", (PROD, TEST))
    config.save(loaded)
    assert path.read_text() == FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["flynnrc"]


def test_keys_are_matched_in_any_case_and_unknown_ones_ignored(tmp_path: Path) -> None:
    parsed = config.parse('Default="a"\n[[Cluster]]\nname="a"\ncontrollerurl="u"\nGitHost="old"\n', tmp_path)
    assert parsed == Config("a", (Cluster(name="a", controller_url="u"),))


def test_without_clusters_the_file_is_empty() -> None:
    assert config.render(Config("x", ())) == ""


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flynnrc"
    path.write_text("default = ")
    with pytest.raises(CliError, match="flynnrc"):
        config.load(path)


@pytest.mark.parametrize(
    ("new", "force", "outcome"),
    [
        param(Cluster("other", controller_url="https://u"), False, ["prod", "test", "other"], id="one more"),
        param(Cluster("prod", controller_url="https://u"), False, "already exists", id="a name that is taken"),
        param(
            Cluster("new", controller_url="https://controller.paas.example"), False, "with the URL", id="a URL is taken"
        ),
        param(Cluster("prod", controller_url="https://u"), True, ["test", "prod"], id="force replaces, at the end"),
        param(
            Cluster("test", controller_url="https://controller.paas.example"),
            True,
            "multiple",
            id="two cannot be forced",
        ),
    ],
)
def test_adding_clusters(new: Cluster, force: bool, outcome: list[str] | str) -> None:
    before = Config("prod", (PROD, TEST))
    if isinstance(outcome, str):
        with pytest.raises(CliError, match=outcome):
            before.added(new, force=force)
    else:
        assert [cluster.name for cluster in before.added(new, force=force).clusters] == outcome


def test_removing_the_default_promotes_the_next() -> None:
    before = Config("prod", (PROD, TEST))
    assert before.removed("prod") == Config("test", (TEST,))
    assert before.removed("test") == Config("prod", (PROD,))
    assert before.removed("prod").removed("test") == Config("", ())


def test_choosing_a_cluster() -> None:
    both = Config("", (TEST, PROD))
    assert both.choose("") is TEST
    assert Config("prod", (TEST, PROD)).choose("") is PROD
    assert both.choose("prod") is PROD
    with pytest.raises(CliError, match='unknown cluster "x"'):
        both.choose("x")
    with pytest.raises(CliError, match="no clusters configured"):
        Config().choose("")


@pytest.mark.parametrize(
    ("url", "app"),
    [
        ("https://git.paas.example/shop.git", "shop"),
        ("https://git.paas.example/shop", None),
        ("https://git.paas.example.org/shop.git", None),
        ("/srv/shop.git", None),
    ],
)
def test_remotes_of_apps(url: str, app: str | None) -> None:
    found = git.match("flynn", url, [TEST, PROD])
    assert (found.app if found else None) == app


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    path = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", str(path)], check=True)
    monkeypatch.chdir(path)
    return path


def remote(name: str, app: str) -> None:
    subprocess.run(["git", "remote", "add", name, f"https://git.paas.example/{app}.git"], check=True)


def context(tmp_path: Path, app: str = "", **environ: str) -> Context:
    path = tmp_path / "flynnrc"
    path.write_text(FILE.replace('default = "prod"', 'default = "test"'))
    return Context(app, "", {"FLYNNRC": str(path), "HOME": str(tmp_path), **environ})


def test_the_git_remote_names_app_and_cluster(repository: Path, tmp_path: Path) -> None:
    remote("flynn", "shop")
    chosen = context(tmp_path)
    assert (chosen.app, chosen.cluster.name) == ("shop", "prod")


def test_the_flag_may_name_a_remote_an_app_or_nothing_known(repository: Path, tmp_path: Path) -> None:
    remote("staging", "shop-staging")
    assert context(tmp_path, "staging").app == "shop-staging"
    assert context(tmp_path, "staging").cluster.name == "prod"
    assert context(tmp_path, "blog").app == "blog"
    assert context(tmp_path, "blog").cluster.name == "test"


def test_the_environment_names_the_app(repository: Path, tmp_path: Path) -> None:
    remote("flynn", "shop")
    assert context(tmp_path, FLYNN_APP="blog").app == "blog"


def test_several_remotes_are_ambiguous_unless_git_says_which(repository: Path, tmp_path: Path) -> None:
    remote("staging", "shop-staging")
    remote("flynn", "shop")
    with pytest.raises(CliError) as refusal:
        _ = context(tmp_path).app
    assert str(refusal.value).endswith("Available Flynn remotes:\nflynn\nstaging")
    subprocess.run(["git", "config", "flynn.remote", "staging"], check=True)
    assert context(tmp_path).app == "shop-staging"


def test_without_a_remote_there_is_no_app(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CliError, match="no apps in git remotes"):
        _ = context(tmp_path).app
    monkeypatch.chdir("/")
    with pytest.raises(CliError, match="no app found, run from a repo with a flynn remote or specify one with -a"):
        _ = context(tmp_path).app


def test_git_asks_for_the_password() -> None:
    answer = "protocol=https\nusername=user\nhost=git.paas.example\npassword=3f0c9a\n"
    assert git.credentials([TEST, PROD], "protocol=https\nhost=git.paas.example") == answer
    assert git.credentials([TEST, PROD], "protocol=http\nhost=git.paas.example") == ""
    assert git.credentials([TEST, PROD], "protocol=https\nhost=github.com") == ""
