"""`/runner/init`: the program as it is, in a slug made by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / ".profile.d").mkdir()
    (tmp_path / ".profile.d" / "1.sh").write_text("export FROM_PROFILE=one\nexport ORDER=1\n")
    (tmp_path / ".profile.d" / "2.sh").write_text("export ORDER=${ORDER}2\n")
    (tmp_path / "Procfile").write_text("web: echo web $FROM_PROFILE $ORDER\nfail: exit 3\n")
    (tmp_path / ".release").write_text(
        "---\nconfig_vars:\n  DEFAULTED: from release\ndefault_process_types:\n  console: echo $DEFAULTED\n  web: no\n"
    )
    return tmp_path


def init(app: Path, *arguments: str, **environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "flynn.slugbuilder.runner", *arguments],
        env={"PATH": "/usr/bin:/bin", "APP_DIR": str(app), "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return done.stdout + done.stderr, done.returncode


def test_a_type_of_the_procfile_runs_after_the_profiles_in_order(app: Path) -> None:
    assert init(app, "start", "web") == ("web one 12\n", 0)


def test_a_type_of_the_buildpack_runs_with_its_defaults(app: Path) -> None:
    assert init(app, "start", "console") == ("from release\n", 0)
    assert init(app, "start", "console", DEFAULTED="mine") == ("mine\n", 0)


def test_an_unknown_type_ends_at_once(app: Path) -> None:
    assert init(app, "start", "nothing") == ("", 0)


def test_a_command_keeps_its_quoting(app: Path) -> None:
    assert init(app, "bash", "-c", "echo 'foo  bar' $FROM_PROFILE") == ("foo  bar one\n", 0)
    assert init(app, "echo", "it's", "$HOME") == ("it's $HOME\n", 0)


def test_the_exit_status_is_the_commands(app: Path) -> None:
    assert init(app, "start", "fail") == ("", 3)


def test_a_failing_profile_ends_the_start(app: Path) -> None:
    (app / ".profile").write_text("false\n")
    assert init(app, "echo", "never") == ("", 1)


def test_a_broken_procfile_is_named(app: Path) -> None:
    (app / "Procfile").write_text("nonsense\n")
    output, status = init(app, "start", "web")
    assert status == 1 and "Procfile line 1" in output
