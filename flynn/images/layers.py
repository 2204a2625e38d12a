"""How the tree of each kind of layer is made. Each function leaves a directory that becomes the squashfs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flynn.images import machine as machines
from flynn.images.files import copy_files, input_files
from flynn.images.machine import Machine
from flynn.images.plan import InputFile
from flynn.images.recipe import Code, Debian, Files, LayerRecipe, Packages, Python, Staged
from flynn.images.recipe import Machine as MachineRecipe
from flynn.images.workshop import (
    Chroot,
    furnished,
    layers_mounted,
    mounted,
    overlay,
    remove_tree,
    run_logged,
)

ENVIRONMENT = "/opt/flynn/env"
SITE_PACKAGES = f"{ENVIRONMENT}/lib/python3.11/site-packages"
UNWANTED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
CA_IN_IMAGE = "/etc/ssl/certs/ca-certificates.crt"

SCRIPT = """\
#!{python} -I
import sys
from {module} import {function}
sys.exit({function}())
"""


class LayerError(Exception):
    """A layer that cannot be made on this machine."""


class FilesChanged(Exception):
    """A file is not what it was when the layer's id was computed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One layer to make: where its parts are and where its tree may be put."""

    files: Sequence[InputFile]  # what goes in, as planned
    below: Sequence[Path]  # squashfs files of the layers it is built on, bottom first
    work: Path  # empty directory of its own
    log: Path
    downloads: Path  # package lists and packages, shared by the layers of one build
    repository: Path
    machine: Machine  # that builds
    carried: Machine  # whose settings images for users' builds carry
    suite: str
    requirements: Sequence[str]
    scripts: Mapping[str, str]
    version: str

    def sources(self) -> tuple[str, ...]:
        found = machines.for_suite(self.machine.apt_sources, self.suite)
        if not found:
            raise LayerError(f"the machine's apt configuration names no source of Debian {self.suite} main")
        return found

    @contextmanager
    def chroot(self, lower: Sequence[Path], work: Path) -> Iterator[tuple[Chroot, Path]]:
        """A furnished overlay over `lower`; yields it with its upper directory."""
        with overlay(lower, work) as (root, upper):
            with furnished(root, self.machine, self.sources(), self.downloads, self.log) as chroot:
                yield chroot, upper


@contextmanager
def tree_of(recipe: LayerRecipe, job: Job) -> Iterator[Path]:
    """Make the layer's tree; it exists for the length of the block."""
    job.work.mkdir(parents=True)
    try:
        with layers_mounted(job.below, job.work / "below") as lower:
            match recipe:
                case Debian():
                    tree = debian(recipe, job)
                case Packages():
                    tree = packages(recipe, job, lower)
                case Staged():
                    tree = staged(recipe.tools, recipe.run, recipe.keep, job, lower)
                case Python():
                    tree = python(recipe, job, lower)
                case Code():
                    tree = code(job, lower)
                case Files():
                    tree = files(recipe, job)
                case MachineRecipe():
                    tree = machine(job)
            yield tree
    finally:
        remove_tree(job.work)


def debian(recipe: Debian, job: Job) -> Path:
    root = job.work / "tree"
    sources = job.work / "sources.list"
    sources.write_text("".join(f"{line}\n" for line in job.sources()))
    options = job.work / "apt.conf"
    options.write_text("".join(f"{line}\n" for line in job.machine.apt_options))
    excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in UNWANTED]
    # What names this machine is taken out again: its mirrors, name servers, host name and CA bundle.
    forget = (
        'rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/hostname; '
        ': > "$1"/etc/apt/sources.list; rm -f "$1"/etc/apt/sources.list.d/*;'
        'rm -f "$1"/etc/resolv.conf; : > "$1"/etc/resolv.conf; '
        'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin "$1"/var/log/* "$1"/var/cache/debconf/*-old; '
        'mkdir -p "$1"/var/lib/apt/lists/partial "$1"/var/cache/apt/archives/partial '
        '"$1"/data "$1"/var/log/apt'
    )
    command = [
        "mmdebstrap",
        "--mode=root",
        "--format=directory",
        "--variant=minbase",
        # The links of a merged /usr are made first: then the package that would merge it, with its Perl, is not needed.
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        f"--include={','.join(recipe.packages)}",
        f"--aptopt={options}",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "0"',
        *excludes,
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        f"--customize-hook={forget}",
        recipe.suite,
        str(root),
        str(sources),
    ]
    run_logged("mmdebstrap", command, job.log)
    return root


def packages(recipe: Packages, job: Job, lower: Sequence[Path]) -> Path:
    with job.chroot(lower, job.work / "build") as (chroot, upper):
        if recipe.before:
            chroot.run(f"{recipe.name}: before", recipe.before)
        if recipe.apt:
            install(chroot, recipe.apt)
        if recipe.run:
            chroot.run(f"{recipe.name}: run", recipe.run)
    _forget_traces(upper)
    return upper


def install(chroot: Chroot, names: Sequence[str]) -> None:
    script = (
        "test -e /var/lib/apt/lists/.updated || { apt-get -q update; touch /var/lib/apt/lists/.updated; }\n"
        "install -m 755 /run/flynn-build/policy-rc.d /usr/sbin/policy-rc.d\n"
        f"apt-get -q install --yes --no-install-recommends {' '.join(names)}\n"
        "rm -f /usr/sbin/policy-rc.d\n"
    )
    chroot.run(f"apt-get install {' '.join(names)}", script)


def staged(tools: Sequence[str], run: str, keep: Sequence[str], job: Job, lower: Sequence[Path]) -> Path:
    """Run a script in a root that has `tools`, and keep only the trees it was to make."""
    with overlay(lower, job.work / "tools") as (root, _):
        with furnished(root, job.machine, job.sources(), job.downloads, job.log) as stage:
            install(stage, tools)
        with overlay([root], job.work / "build") as (build, upper):
            with furnished(build, job.machine, job.sources(), job.downloads, job.log) as chroot:
                chroot.run("run", run)
    kept = job.work / "tree"
    kept.mkdir()
    for path in keep:
        target = kept / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        (upper / path.lstrip("/")).rename(target)
    return kept


def python(recipe: Python, job: Job, lower: Sequence[Path]) -> Path:
    requirements = "\n".join(job.requirements)
    removals = " ".join(f"{SITE_PACKAGES}/{pattern}" for pattern in recipe.remove)
    script = f"""
python3 -m venv --without-pip {ENVIRONMENT}
cat > /tmp/requirements.txt <<'END'
{requirements}
END
pip --python {ENVIRONMENT}/bin/python3 install --no-cache-dir --no-compile --quiet -r /tmp/requirements.txt
find {ENVIRONMENT} -name '*.so' -exec strip --strip-unneeded {{}} +
find {ENVIRONMENT}/bin -mindepth 1 ! -name 'python*' -delete
rm -rf {removals} {ENVIRONMENT}/include
find {ENVIRONMENT} -type d -name tests -prune -exec rm -rf {{}} +
python3 -m compileall -q --invalidation-mode unchecked-hash {SITE_PACKAGES} || test $? = 1
"""
    return staged(recipe.tools, script, [ENVIRONMENT], job, lower)


def code(job: Job, lower: Sequence[Path]) -> Path:
    """The package as sources and bytecode that is never checked against them: nothing in it tells the time."""
    tree = job.work / "tree"
    site = tree / SITE_PACKAGES.lstrip("/")
    _copy_planned(job, {"flynn": site / "flynn"})
    info = site / f"flynn-{job.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flynn\nVersion: {job.version}\n")
    scripts = tree / "usr/local/bin"
    scripts.mkdir(parents=True)
    for name, entry in job.scripts.items():
        module, _, function = entry.partition(":")
        script = scripts / name
        script.write_text(SCRIPT.format(python=f"{ENVIRONMENT}/bin/python3", module=module, function=function))
        script.chmod(0o755)
    # Compiled by the image's own interpreter; a file with a syntax error is left out and fails where it is imported.
    with mounted(job.work / "root", "--bind", lower[0]) as root:
        with mounted(root / "mnt", "--bind", site):
            command = ["chroot", str(root), "python3", "-m", "compileall", "-q", "-s", "/mnt", "-p", SITE_PACKAGES]
            command += ["--invalidation-mode", "unchecked-hash", "/mnt/flynn"]
            with job.log.open("ab") as output:
                subprocess.run(command, stdout=output, stderr=output, check=False)
    return tree


def files(recipe: Files, job: Job) -> Path:
    tree = job.work / "tree"
    tree.mkdir()
    for directory in recipe.directories:
        (tree / directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
    _copy_planned(job, {source: tree / target.lstrip("/") for source, target in recipe.copy.items()})
    for link, target in recipe.links.items():
        path = tree / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return tree


def _copy_planned(job: Job, copies: Mapping[str, Path]) -> None:
    """Copy from the repository and check that what came is what the layer's id was computed from."""
    for source, target in copies.items():
        copy_files(job.repository / source, target)
    copied = {file for source, target in copies.items() for file in input_files(target, source)}
    if copied != set(job.files):
        raise FilesChanged(f"{min(copied ^ set(job.files)).path} has changed during the build")


def machine(job: Job) -> Path:
    tree = job.work / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/pip.conf").write_text(job.carried.pip_conf(CA_IN_IMAGE))
    # npm looks for its global settings below the prefix of the node it runs on.
    for path in ("etc/npmrc", "usr/etc/npmrc", "usr/local/etc/npmrc"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(job.carried.npmrc(CA_IN_IMAGE))
    if job.carried.ca_bundle:
        bundle = tree / CA_IN_IMAGE.lstrip("/")
        bundle.parent.mkdir(parents=True)
        bundle.write_bytes(job.carried.ca_bundle)
    return tree


def _forget_traces(upper: Path) -> None:
    """Remove what package managers leave that differs from build to build and helps nobody."""
    for pattern in ("var/log/*.log", "var/log/apt/*", "var/cache/debconf/*-old", "var/cache/apt/*.bin", "root/.*"):
        for path in upper.glob(pattern):
            remove_tree(path)
