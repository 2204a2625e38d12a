"""A real build, as small as one can be: Debian below, then the repository's own code and some files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flynn.images.store import Store
from flynn.types.artifact import Artifact
from flynn.types.codec import decode

PYPROJECT = """\
[project]
version = "1.2.3"
dependencies = []
[project.optional-dependencies]
node = []
[project.scripts]
flynn-hello = "flynn.hello:main"
flynn-missing = "flynn.missing:main"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "images/layers").mkdir(parents=True)
    (root / "flynn").mkdir()
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "flynn/__init__.py").write_text("")
    (root / "flynn/hello.py").write_text("def main():\n    print('hello')\n")
    (root / "flynn/broken.py").write_text("def main(:\n")
    (root / "images/hello.yaml").write_text("layers: [debian, motd, code]")
    (root / "images/layers/debian.yaml").write_text("{kind: debian, suite: bookworm, packages: [python3]}")
    (root / "images/layers/motd.yaml").write_text("{kind: packages, run: 'rm /etc/motd; echo hi > /etc/greeting'}")
    (root / "images/layers/code.yaml").write_text("kind: code")
    return root


def artifact(out: Path) -> Artifact:
    return decode((out / "hello.json").read_bytes(), Artifact)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_build_makes_layers_once_and_after_a_change_only_the_code(repository: Path, tmp_path: Path) -> None:
    kill_a_build_half_way(repository, tmp_path)
    # In a process of its own, as in use: a build takes a mount namespace for the rest of its process's life.
    said = build_in_process(repository, tmp_path)
    assert [line.split(":")[0] for line in said if "building" in line] == ["layer debian", "layer motd", "layer code"]
    first = artifact(tmp_path / "out")
    layers = [Path(first.layer_url(layer).removeprefix("file://")) for layer in first.image().layers()]
    assert all(path.stat().st_size == layer.length for path, layer in zip(layers, first.image().layers(), strict=True))

    listed = {path.name: listing(path) for path in layers}
    base, motd, code = listed.values()
    assert "usr/bin/python3" in base
    assert not any(name.startswith("usr/share/man/") for name in base)
    assert motd["etc/motd"].startswith("c")  # a whiteout: the file is gone from the image
    assert "etc/greeting" in motd
    assert not any(name.startswith(("run/", "tmp/", "dev/", "var/lib/apt/lists/", "root/")) for name in motd)
    assert {"usr/local/bin/flynn-hello", "usr/local/bin/flynn-missing"} <= code.keys()
    assert [name for name in code if name.endswith(".pyc") and "hello" in name]

    assert build_in_process(repository, tmp_path) == [f"1 images of 3 layers in {tmp_path / 'out'}"]

    (repository / "flynn/hello.py").write_text("def main():\n    print('good day')\n")
    said = build_in_process(repository, tmp_path)
    assert [line.split(":")[0] for line in said if "building" in line] == ["layer code"]
    second = artifact(tmp_path / "out")
    assert second.image().layers()[:2] == first.image().layers()[:2]
    assert second.uri != first.uri
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert not (tmp_path / "cache/work").exists()


def kill_a_build_half_way(repository: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the first layer: no process may go on working in the cache."""
    process = subprocess.Popen(build_command(repository, tmp_path), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("cache/work/layer/tree/var/lib/dpkg/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, processes_of(tmp_path)
        time.sleep(0.05)


def processes_of(tmp_path: Path) -> list[str]:
    """Command lines of processes with the cache in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(tmp_path / "cache/work") in line:
            found.append(line)
    return found


def listing(squashfs: Path) -> dict[str, str]:
    """Paths in a squashfs -> their mode column."""
    lines = subprocess.run(["unsquashfs", "-ll", "-d", "", squashfs], capture_output=True, text=True, check=True).stdout
    entries = [line for line in lines.splitlines() if " /" in line]
    return {line.partition(" /")[2].partition(" -> ")[0]: line.split()[0] for line in entries}


def test_a_layer_without_its_json_or_with_another_length_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_text("a")
    layer = store.add("abc", tree, 1, keep_times=False)
    assert store.find("abc") == layer
    assert store.add("abc", tree, 1, keep_times=False) == layer  # equal content, equal layer
    store.squashfs("abc").write_bytes(b"cut off")
    assert store.find("abc") is None
    assert store.find("other") is None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_release_the_machine_has_no_mirror_for_is_refused_in_one_line(repository: Path, tmp_path: Path) -> None:
    (repository / "images/layers/debian.yaml").write_text("{kind: debian, suite: nosuch}")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build_in_process(repository, tmp_path)
    assert failed.value.stderr.splitlines()[-1] == (
        "flynn-images: the machine's apt configuration names no source of Debian nosuch main"
    )


def build_in_process(repository: Path, tmp_path: Path) -> list[str]:
    command = build_command(repository, tmp_path)
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


def build_command(repository: Path, tmp_path: Path) -> list[str]:
    command = [sys.executable, "-m", "flynn.images.main", "build", "--repository", str(repository)]
    return [*command, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
