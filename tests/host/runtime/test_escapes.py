"""Isolation, proved: jobs that try to get out, one row of the table in `escapes.py` each. Made for `pytest -s`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from flynn.host import attach
from flynn.host.client import HostClient
from flynn.host.runtime import kernel
from flynn.host.runtime.runtime import Exit, Runtime, StartFailed
from flynn.host.runtime.seccomp import ARCHITECTURES
from flynn.host.runtime.spec import DEFAULT_CAPABILITIES, ContainerSpec, Limits, Mount, RootFS
from flynn.types import host as wire
from flynn.types.host import AttachFlag, AttachReq, ContainerConfig, HostJob, Mountspec
from flynn.types.resources import Limit
from tests.host.machine import META, TestMachine, ended
from tests.host.runtime.conftest import network, read, run, started
from tests.host.runtime.escapes import BEGIN, CONTROL_PORTS, END, PAGE, ROWS, render

pytestmark = [pytest.mark.root, pytest.mark.slow]
Make = Callable[..., ContainerSpec]

HERE = Path(__file__).parent
PYTHON = os.path.realpath(sys.executable)
#: What a Python of the host needs inside a container.
LIBRARIES = [path for path in ("/lib", "/lib64", "/usr/lib") if os.path.exists(path)]
SOURCES = [*LIBRARIES, sys.base_prefix, str(HERE / "attacker.py")]
TARGETS = [*LIBRARIES, sys.base_prefix, "/attacker.py"]
MOUNTS = tuple(Mount(target=target, source=source) for source, target in zip(SOURCES, TARGETS, strict=True))
DESCRIPTORS = range(3, 24)  # init's, of which some are the host's
seen: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print what was seen, whatever the verdict."""
    yield
    for row in ROWS:
        print(f"{row.name:60} {seen.get(row.name, 'not tried'):20} {row.by}")
    print(f"{len(ROWS)} rows, {len(seen)} tried, {sum(seen.get(r.name) in r.outcomes for r in ROWS)} refused")


def attack(names: Collection[str], **parameters: Any) -> str:
    """The environment variable that tells the attacker what to do."""
    machine = ARCHITECTURES[os.uname().machine]
    status = os.stat("/").st_dev
    return json.dumps(
        {
            "attempts": list(names),
            "numbers": dict(machine.numbers),
            "disk": [os.major(status), os.minor(status)],
            "capabilities": f"{kernel.capability_mask(DEFAULT_CAPABILITIES):016x}",
            **parameters,
        }
    )


def names(place: str) -> list[str]:
    return [row.name for row in ROWS if row.place == place]


def judge(outcomes: dict[str, str]) -> None:
    seen.update(outcomes)
    wanted = {row.name: row.outcomes for row in ROWS}
    escaped = {name: outcome for name, outcome in outcomes.items() if outcome not in wanted[name]}
    assert escaped == {}


@pytest.fixture
def attacker(spec: Make) -> Make:
    def make(names: Collection[str], parameters: dict[str, Any], **fields: Any) -> ContainerSpec:
        made = spec(mounts=(*MOUNTS, *fields.pop("mounts", ())), **fields)
        environment = {**made.env, "ATTACK": attack(names, **parameters), "PYTHONDONTWRITEBYTECODE": "1"}
        return ContainerSpec(
            **{name: getattr(made, name) for name in made.__slots__ if name not in ("env", "args")},
            env=environment,
            args=fields.get("args", (PYTHON, "/attacker.py")),
        )

    return make


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The top layer of an image, to be filled by the test; and something on the host to get at."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "marker").write_text("the host's")
    (tmp_path / "hostile").mkdir()
    return tmp_path / "hostile"


def with_layer(made: ContainerSpec, layer: Path, **fields: Any) -> ContainerSpec:
    root = RootFS(lower=(*made.rootfs.lower, str(layer)), writable=made.rootfs.writable)
    values = {name: getattr(made, name) for name in made.__slots__}
    return ContainerSpec(**{**values, "rootfs": root, **fields})


async def test_from_inside_a_job(runtime: Runtime, attacker: Make, spec: Make, hostile: Path) -> None:
    os.mknod(hostile / "hostile-disk", 0o060666, os.stat("/").st_dev)
    os.chmod(hostile / "hostile-disk", 0o666)
    victim = await started(runtime, spec("sleep 100", env={**spec().env, "SECRET": "VICTIM-" + "SECRET"}))
    name = f"flynn-escape-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        parameters = {"victim": victim.pid, "abstract": name, "marker": str(hostile.parent / "outside/marker")}
        limits = Limits(memory_bytes=256 << 20, pids=64, fds=(256, 256))
        made = attacker(names("job"), parameters, limits=limits, network=network(60))
        container = await runtime.create(with_layer(made, hostile))
        await container.resume()
        out, err = await asyncio.gather(_all(container.stdout), _all(container.stderr))
        assert err == ""
        assert await container.wait() == Exit(0, oom=True)
        await container.destroy()
    assert victim.state.value == "running"
    await victim.destroy()
    judge(json.loads(out))


async def _all(fd: int | None) -> str:
    """The attempts take longer than `read` waits for a word."""
    async with asyncio.timeout(40):
        while True:
            try:
                return await read(fd)
            except TimeoutError:
                continue


async def test_setuid_program(runtime: Runtime, attacker: Make, hostile: Path) -> None:
    shutil.copy(PYTHON, hostile / "suid-python")
    os.chmod(hostile / "suid-python", 0o4755)
    environment = {"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib", "PYTHONHOME": sys.base_prefix}
    made = attacker(["setuid program"], {}, uid=1000, gid=1000)
    # The interpreter of a developer may live below /root, closed to others: the copy in the layer does the asking too.
    shutil.copy(PYTHON, hostile / "plain-python")
    made = with_layer(made, hostile, args=("/plain-python", "/attacker.py"), env={**made.env, **environment})
    _, out, err = await run(runtime, made)
    assert err == ""
    judge(json.loads(out))


async def test_the_runtimes_own_program(runtime: Runtime, attacker: Make, hostile: Path) -> None:
    script = (HERE / "attacker.py").read_text()
    (hostile / "start").write_text(f"#!/proc/self/exe\n{script}")
    (hostile / "start").chmod(0o755)
    made = attacker(["write to the runtime's own program"], {})
    _, out, err = await run(runtime, with_layer(made, hostile, args=("/start",)))
    assert err == ""
    judge(json.loads(out))


class TestHostileImages:
    """What the runtime itself does, as the machine's root, for an image or a release made to fool it."""

    async def _refused(self, runtime: Runtime, row: str, *specs: ContainerSpec) -> None:
        """None of the containers prints the host's secret, nor changes the host."""
        outside = Path(specs[0].directory).parents[1] / "outside"
        for made in specs:
            try:
                _, out, _ = await run(runtime, made)
            except StartFailed:
                out = ""
            assert "the host's" not in out, f"{row}: {made}"
        assert sorted(path.name for path in outside.rglob("*")) == ["marker"], row
        assert (outside / "marker").read_text() == "the host's"
        judge({row: "refused"})

    def _links(self, hostile: Path, target: str, way: str = "self") -> list[str]:
        for fd in DESCRIPTORS:
            (hostile / f"fd{fd}").symlink_to(f"/proc/{way}/fd/{fd}" + "/.." * 12 + target)
        return [f"/fd{fd}" for fd in DESCRIPTORS]

    async def test_mount_target(self, runtime: Runtime, spec: Make, hostile: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        links = self._links(hostile, str(outside))
        (tmp_path / "data").mkdir()
        for link in links:
            made = with_layer(
                spec(f"cat {link}/marker; true"),
                hostile,
                mounts=(Mount(target=f"{link}/x", source=f"{tmp_path}/data"),),
            )
            with pytest.raises(StartFailed):
                await runtime.create(made)
        await self._refused(runtime, "image: mount target is a link to /proc/self/fd", spec("true"))

    async def test_etc(self, runtime: Runtime, spec: Make, hostile: Path, tmp_path: Path) -> None:
        specs = []
        for fd in DESCRIPTORS:
            image = hostile / str(fd)
            image.mkdir()
            (image / "etc").symlink_to(f"/proc/self/fd/{fd}" + "/.." * 12 + f"{tmp_path}/outside")
            specs.append(with_layer(spec("cat /etc/marker"), image, hosts="evil\n", resolv_conf="evil\n"))
        await self._refused(runtime, "image: /etc is a link to /proc/self/fd (hosts file)", *specs)

    @pytest.mark.parametrize("name", ["proc", "sys", "dev"])
    async def test_system_directories(self, runtime: Runtime, spec: Make, hostile: Path, name: str) -> None:
        (hostile / name).symlink_to("tmp")
        made = with_layer(spec("true"), hostile)
        with pytest.raises(StartFailed):
            await runtime.create(made)
        await self._refused(runtime, f"image: /{name} is a symbolic link", spec("true"))

    @pytest.mark.parametrize("way", ["self", "1"])
    async def test_working_directory(
        self, runtime: Runtime, spec: Make, hostile: Path, tmp_path: Path, way: str
    ) -> None:
        links = self._links(hostile, f"{tmp_path}/outside", way)
        specs = [with_layer(spec("cat marker"), hostile, cwd=link) for link in links]
        await self._refused(runtime, f"image: working directory is a link to /proc/{way}/fd", *specs)

    async def test_command(self, runtime: Runtime, spec: Make, hostile: Path, tmp_path: Path) -> None:
        (tmp_path / "outside/marker").chmod(0o755)
        shell = tmp_path / "busybox"  # which must find its name last in the path, or it does nothing and proves nothing
        shutil.copy("/usr/bin/busybox", shell)
        links = self._links(hostile, str(tmp_path))
        words = ("echo", "the host's program ran")
        specs = [with_layer(spec(), hostile, args=(f"{link}/busybox", *words)) for link in links]
        await self._refused(runtime, "image: command is the host's by /proc/self/fd", *specs)
        for link in links:
            script = hostile / f"script{link[1:]}"
            script.write_text(f"#!/proc/self/fd/{link[3:]}{'/..' * 12}{shell} echo\n")
            script.chmod(0o755)
        specs = [with_layer(spec(), hostile, args=(f"/script{link[1:]}", "the host's program ran")) for link in links]
        await self._refused(runtime, "image: interpreter is the host's by /proc/self/fd", *specs)

    async def test_targets_stay_inside(self, runtime: Runtime, spec: Make, hostile: Path, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/mine").write_text("mine\n")
        mark = f"escape-{uuid.uuid4()}"
        (hostile / "data").symlink_to("/etc")
        for target, row in (
            (f"/data/{mark}", "image: mount target is a link to /etc"),
            (f"/dev/../../../../../etc/{mark}", "image: mount target with many .."),
        ):
            mount = Mount(target=target, source=f"{tmp_path}/data", writable=True)
            _, out, _ = await run(runtime, with_layer(spec(f"cat /etc/{mark}/mine"), hostile, mounts=(mount,)))
            assert out == "mine\n"
            assert not os.path.exists(f"/etc/{mark}")
            judge({row: "contained"})
        (hostile / "etc").mkdir()
        (hostile / "etc/resolv.conf").symlink_to(f"{tmp_path}/outside/marker")
        _, out, _ = await run(runtime, with_layer(spec("cat /etc/resolv.conf"), hostile, resolv_conf="mine\n"))
        assert out == "mine\n"
        assert (tmp_path / "outside/marker").read_text() == "the host's"
        judge({"image: resolv.conf is a link to the host's path": "contained"})

    async def test_layers_are_not_written(self, runtime: Runtime, spec: Make, hostile: Path) -> None:
        (hostile / "file").write_text("of the layer")
        made = with_layer(spec("echo changed > /file; rm /bin/vi; cat /file"), hostile)
        before = hashlib.sha256(Path(made.rootfs.lower[0], "bin/busybox").read_bytes()).digest()
        assert (await run(runtime, made))[1] == "changed\n"
        assert (hostile / "file").read_text() == "of the layer"
        assert hashlib.sha256(Path(made.rootfs.lower[0], "bin/busybox").read_bytes()).digest() == before
        judge({"overwrite a file of a layer": "contained"})


def _job(image: Mountspec, names: Collection[str], **parameters: Any) -> HostJob:
    mounts = [wire.Mount(location=target, target=source) for source, target in zip(SOURCES, TARGETS, strict=True)]
    config = ContainerConfig(
        args=[PYTHON, "/attacker.py"],
        env={"ATTACK": attack(names, **parameters), "PYTHONDONTWRITEBYTECODE": "1"},
        mounts=mounts,
    )
    limits = {"memory": Limit(limit=512 << 20), "temp_disk": Limit(limit=64 << 20)}
    return HostJob(
        id=f"node1-{uuid.uuid4()}", mountspecs=[image], metadata=META, config=config, resources=limits, partition="user"
    )


async def _printed(host: HostClient, job_id: str, until: str = "") -> str:
    """What a job has printed: to its end, or until a line is there."""
    text = b""
    flags = AttachFlag.STDOUT | AttachFlag.STDERR | AttachFlag.LOGS | AttachFlag.STREAM
    async with asyncio.timeout(30), host.attach(AttachReq(job_id=job_id, flags=flags)) as attachment:
        async for frame in attachment.frames():
            if isinstance(frame, attach.Data):
                text += frame.data
            if until and until.encode() in text:
                break
    return text.decode()


async def test_from_inside_a_node(machine: TestMachine, host: HostClient, image: Mountspec) -> None:
    """Control ports, forged frames and the write layer, with the daemon's own bridge, packet filter and limits."""
    victim = _job(image, ["victim"])
    await host.add_job(victim)
    await _printed(host, victim.id, until="listening")
    address = (await host.job(victim.id)).internal_ip
    bridge = "100.102.7.1"
    attempts = [name for name in names("daemon") if name.partition(",")[0].startswith(("the ", "disk"))]
    places = {"the host's address": machine.ip, "the bridge's address": bridge, "the host's loopback": "127.0.0.1"}
    attacker = _job(image, [*attempts, "forged frames"], victim_ip=address, addresses=places, ports=CONTROL_PORTS)
    await host.add_job(attacker)
    outcomes = json.loads(await _printed(host, attacker.id))
    assert outcomes.pop("forged frames") == "sent"
    report = json.loads((await _printed(host, victim.id)).splitlines()[-1])
    await ended(host, victim.id)
    assert "genuine" in report["came"], "the forged frames prove nothing if real ones do not arrive either"
    command = ["ip", "-n", machine.name, "-o", "link", "show", machine.name[:15]]
    link = await asyncio.to_thread(subprocess.check_output, command, text=True)
    came = report["came"]
    judge(
        {
            **outcomes,
            "frame with another job's address": "arrived" if "forged address" in came else "dropped",
            "frame with another job's address and MAC": "arrived" if "forged address and mac" in came else "dropped",
            "ARP: be the gateway": "dropped" if report["gateway"] in link else f"poisoned: {report['gateway']}",
        }
    )


def test_the_page_shows_this_table() -> None:
    assert BEGIN + render() + END in PAGE.read_text(), "run python -m tests.host.runtime.escapes"
