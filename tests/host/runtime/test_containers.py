"""Containers as their users see them: real namespaces, mounts and cgroups."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from flynn.host.runtime.cgroups import Layout
from flynn.host.runtime.runtime import ContainerLost, Exit, NotRunning, Runtime, StartFailed, State
from flynn.host.runtime.spec import ContainerSpec, Device, Limits, Mount, from_json, to_json
from tests.host.runtime.conftest import ADDRESS, network, read, run, started

pytestmark = pytest.mark.root
Make = Callable[..., ContainerSpec]


class TestEnd:
    async def test_exit_code_and_both_streams(self, runtime: Runtime, spec: Make) -> None:
        assert await run(runtime, spec("echo out; echo err >&2; exit 3")) == (Exit(3), "out\n", "err\n")

    async def test_killed_by_signal_is_128_and_the_number(self, runtime: Runtime, spec: Make) -> None:
        assert (await run(runtime, spec("kill -KILL $$")))[0] == Exit(137, 9)

    async def test_kill_takes_everything(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("sleep 100 & sleep 100"))
        await container.kill()
        assert await container.wait() == Exit(137, 9)
        await container.destroy()
        with pytest.raises(NotRunning):
            await container.signal(15)

    async def test_nothing_survives_the_main_process(self, runtime: Runtime, spec: Make) -> None:
        done, out, _ = await run(runtime, spec("(sleep 100; echo late) & exit 0"))
        assert (done, out) == (Exit(0), "")

    async def test_signal_reaches_the_job_and_its_last_words_arrive(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.01; done"))
        while not os.path.exists(f"/proc/{container.pid}/root/tmp"):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await container.signal(signal.SIGTERM)
        assert await container.wait() == Exit(5)
        assert await read(container.stdout) == "up\nbye\n"
        await container.destroy()

    async def test_signal_before_the_start_is_kept(self, runtime: Runtime, spec: Make) -> None:
        container = await runtime.create(spec("sleep 100"))
        await container.signal(signal.SIGTERM)
        await container.resume()
        assert await container.wait() == Exit(143, 15)
        await container.destroy()

    async def test_orphans_are_reaped(self, runtime: Runtime, spec: Make) -> None:
        _, out, _ = await run(runtime, spec("(sleep 0.05 &); sleep 0.2; ps -o stat,comm | grep -c ^Z"))
        assert out == "0\n"

    async def test_destroy_twice(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("sleep 100"))
        await container.destroy()
        await container.destroy()
        assert container.state is State.ENDED
        assert not container.directory.exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            pytest.param({"args": ("foo",)}, 'exec: "foo": executable file not found in $PATH', id="not in PATH"),
            pytest.param({"args": ("/foo",)}, 'exec: "/foo": stat /foo: no such file or directory', id="no such file"),
            pytest.param({"args": ("/notexec",)}, 'exec: "/notexec": permission denied', id="not executable"),
            pytest.param({"args": ()}, "no command given", id="no command"),
            pytest.param({"cwd": "/nowhere"}, "chdir /nowhere: no such file or directory", id="no directory"),
        ],
    )
    async def test_command(self, runtime: Runtime, spec: Make, fields: dict[str, object], text: str) -> None:
        container = await runtime.create(spec(**fields))
        with pytest.raises(StartFailed) as caught:
            await container.resume()
        assert str(caught.value) == text
        assert (await container.wait()).error == text
        await container.destroy()

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            pytest.param({"partition": "x"}, 'host: invalid job partition "x"', id="partition"),
            pytest.param({"id": "../x"}, "invalid container id: '../x'", id="id"),
            pytest.param({"capabilities": ("FLY",)}, "unknown capability: FLY", id="capability"),
            pytest.param(
                {"mounts": (Mount(target="/x", source="/no/such"),)},
                "open /no/such for mounting: No such file or directory",
                id="mount source",
            ),
        ],
    )
    async def test_set_up(self, runtime: Runtime, spec: Make, fields: dict[str, object], text: str) -> None:
        with pytest.raises(StartFailed) as caught:
            await runtime.create(spec(**fields))
        assert str(caught.value) == text


class TestSurroundings:
    async def test_identity(self, runtime: Runtime, spec: Make) -> None:
        _, out, err = await run(runtime, spec("id -u; id -g; id -G; echo $$; pwd", uid=1000, gid=1001, cwd="/tmp"))
        assert (out, err) == ("1000\n1001\n1001\n2\n/tmp\n", "")

    async def test_files(self, runtime: Runtime, spec: Make, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/f").write_text("shared\n")
        (tmp_path / "one").write_text("one file\n")
        mounts = (
            Mount(target="/deep/data", source=str(tmp_path / "data"), writable=True),
            Mount(target="/ro", source=str(tmp_path / "data")),
            Mount(target="/etc/one", source=str(tmp_path / "one")),
            Mount(target="/ram", source="tmpfs", fstype="tmpfs", options="size=1m"),
        )
        script = """
            cat /etc/resolv.conf /etc/hosts /deep/data/f /etc/one
            echo back > /deep/data/g; touch /ro/x 2>/dev/null || echo refused; touch /ram/x /root-is-writable
            df -k /dev/shm | tail -1 | awk '{print $2}'
        """
        fields = {"mounts": mounts, "resolv_conf": "nameserver 1.2.3.4\n", "hosts": "127.0.0.1 localhost\n"}
        _, out, err = await run(runtime, spec(script, **fields))
        assert out == "nameserver 1.2.3.4\n127.0.0.1 localhost\nshared\none file\nrefused\n65536\n"
        assert err == ""
        assert (tmp_path / "data/g").read_text() == "back\n"

    async def test_symlink_targets_stay_inside(self, runtime: Runtime, spec: Make, tmp_path: Path) -> None:
        (tmp_path / "secret").mkdir()
        mount = Mount(target="/dev/../../../../etc/in/side", source=str(tmp_path / "secret"))
        _, out, _ = await run(runtime, spec("ls -d /etc/in/side", mounts=(mount,)))
        assert out == "/etc/in/side\n"

    async def test_proc_is_protected(self, runtime: Runtime, spec: Make) -> None:
        script = "echo 1 > /proc/sys/vm/swappiness; touch /proc/irq; wc -c < /proc/keys; ls /proc/1/root"
        _, out, err = await run(runtime, spec(script))
        assert out == "0\n"
        assert err.count("Read-only file system") == 2
        assert "/proc/1/root: Permission denied" in err

    async def test_standard_streams_can_be_opened_again(self, runtime: Runtime, spec: Make) -> None:
        script = "(echo sub > /dev/stdout); echo err > /dev/stderr"
        assert (await run(runtime, spec(script, uid=1000, gid=1000)))[1:] == ("sub\n", "err\n")

    async def test_capabilities(self, runtime: Runtime, spec: Make) -> None:
        _, out, _ = await run(runtime, spec("grep ^Cap /proc/self/status | cut -f2", capabilities=("KILL",)))
        assert out.split() == ["0000000000000020"] * 5
        _, out, _ = await run(runtime, spec("grep ^Cap /proc/self/status | cut -f2", capabilities=()))
        assert out.split() == ["0000000000000000"] * 5

    async def test_forbidden_calls_fail(self, runtime: Runtime, spec: Make) -> None:
        script = "mount -t tmpfs x /tmp; unshare -U true; unshare -m true; hostname other; true"
        _, _, err = await run(runtime, spec(script, capabilities=("SYS_CHROOT",)))
        assert err.lower().count("not permitted") + err.count("permission denied") == 4
        fields = {"capabilities": ("SYS_ADMIN",), "seccomp": True}
        _, _, err = await run(runtime, spec("mount -t tmpfs x /tmp", **fields))
        assert err == ""

    async def test_devices(self, runtime: Runtime, spec: Make) -> None:
        script = "head -c 3 /dev/zero | wc -c; mknod /tmp/disk b 254 0; head -c 1 /tmp/disk"
        _, out, err = await run(runtime, spec(script))
        assert out == "3\n"
        assert "Operation not permitted" in err
        loops = (Device(type="b", major=7, minor=0, path="/dev/loop0"),)
        _, out, _ = await run(runtime, spec("ls /dev/loop0 /dev/null", devices_created=loops))
        assert out == "/dev/loop0\n/dev/null\n"

    async def test_limits(self, runtime: Runtime, spec: Make) -> None:
        limits = Limits(memory_bytes=256 << 20, cpu_shares=768, pids=10, fds=(512, 1024))
        script = """
            cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.shares /sys/fs/cgroup/pids/pids.max
            ulimit -n; ulimit -Hn; touch /sys/fs/cgroup/x 2>/dev/null || echo ro
        """
        _, out, _ = await run(runtime, spec(script, limits=limits))
        assert out.split() == [str(256 << 20), "768", "10", "512", "1024", "ro"]

    async def test_pid_limit_stops_a_fork_bomb(self, runtime: Runtime, spec: Make) -> None:
        _, _, err = await run(runtime, spec("for i in $(seq 50); do sleep 1 & done", limits=Limits(pids=10)))
        assert "can't fork" in err

    async def test_out_of_memory_is_told(self, runtime: Runtime, spec: Make) -> None:
        container = await runtime.create(spec("tail /dev/zero", limits=Limits(memory_bytes=32 << 20)))
        await container.resume()
        async with asyncio.timeout(20):
            assert await container.wait() == Exit(137, 9, oom=True)
            assert [count async for count in container.oom_kills()] == [1]
        await container.destroy()

    async def test_out_of_memory_of_a_child_is_told_while_the_job_lives(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("tail /dev/zero; sleep 100", limits=Limits(memory_bytes=32 << 20)))
        async with asyncio.timeout(20):
            assert await anext(container.oom_kills()) == 1
        assert container.state is State.RUNNING
        assert container.stats().oom_kills == 1
        await container.destroy()

    async def test_host_pid_namespace(self, runtime: Runtime, spec: Make) -> None:
        _, out, _ = await run(runtime, spec(f"ls -d /proc/{os.getpid()}; sleep 100 & exit 0", host_pid_namespace=True))
        assert out == f"/proc/{os.getpid()}\n"

    async def test_no_descriptor_leaks_into_the_job(self, runtime: Runtime, spec: Make) -> None:
        _, out, _ = await run(runtime, spec("ls /proc/self/fd", network=network(30), stdin=True))
        assert out.split() == ["0", "1", "2", "3"]  # 3 is the directory being listed

    async def test_many_at_once(self, runtime: Runtime, spec: Make) -> None:
        specs = [spec(f"echo {n}", network=network(40 + n)) for n in range(20)]
        results = await asyncio.gather(*(run(runtime, each) for each in specs))
        assert [out for _, out, _ in results] == [f"{n}\n" for n in range(20)]


class TestTerminal:
    async def test_size_and_control(self, runtime: Runtime, spec: Make) -> None:
        done, out, _ = await run(runtime, spec("tty; stty size", tty=True, stdin=True, window=(24, 80)))
        assert (done, out) == (Exit(0), "/dev/pts/0\r\n24 80\r\n")

    async def test_resize_and_interrupt(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("read line; stty size; cat", tty=True, stdin=True))
        assert container.pty is not None
        await asyncio.sleep(0.1)
        await container.resize(30, 100)
        await asyncio.sleep(0.1)
        os.write(container.pty, b"hi\n")
        await asyncio.sleep(0.1)
        os.write(container.pty, b"\x03")
        assert "30 100\r\n" in await read(container.pty)
        assert (await container.wait()).code == 130
        await container.destroy()


class TestStdin:
    async def test_reaches_its_end(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("cat; echo end", stdin=True))
        assert container.stdin is not None
        os.write(container.stdin, b"typed\n")
        await container.close_stdin()
        assert await read(container.stdout) == "typed\nend\n"
        await container.wait()
        await container.destroy()

    async def test_is_empty_unless_wanted(self, runtime: Runtime, spec: Make) -> None:
        assert (await run(runtime, spec("cat; echo end")))[1] == "end\n"


class TestNetwork:
    async def test_own_address_and_gateway(self, runtime: Runtime, spec: Make) -> None:
        script = (
            f"hostname; ip -o addr; ip route; cat /sys/class/net/eth0/mtu; ping -c1 -W2 {ADDRESS} >/dev/null && echo ok"
        )
        _, out, _ = await run(runtime, spec(script, network=network(9, mtu=1350)))
        assert "host-1\n" in out
        assert "inet 100.101.7.9/24 brd 100.101.7.255" in out
        assert f"default via {ADDRESS} dev eth0" in out
        assert out.endswith("1350\nok\n")

    async def test_containers_reach_each_other(self, runtime: Runtime, spec: Make) -> None:
        server = await started(runtime, spec("echo served | nc -l -p 8080", network=network(10)))
        await asyncio.sleep(0.2)
        _, out, err = await run(runtime, spec("ip n; nc 100.101.7.10 8080 </dev/null", network=network(11)))
        assert (out, err) == ("served\n", "")
        await server.destroy()

    async def test_interfaces_vanish(self, runtime: Runtime, spec: Make) -> None:
        await run(runtime, spec(network=network(12)))
        assert "vflynn" not in [name[:6] for _, name in socket.if_nameindex()]

    async def test_a_new_owner_of_an_address_takes_the_port_over(self, runtime: Runtime, spec: Make) -> None:
        first = await started(runtime, spec("sleep 100", network=network(13)))
        _, out, _ = await run(runtime, spec(f"ping -c1 -W2 {ADDRESS} | grep -c ttl", network=network(13)))
        assert out == "1\n"
        await first.destroy()


class TestDaemonDeath:
    async def test_takes_over_a_running_container(self, runtime: Runtime, spec: Make, tmp_path: Path) -> None:
        first = await started(
            runtime, spec("echo one; read line; echo got $line; exit 4", stdin=True, network=network(20))
        )
        first.close()  # as a dead daemon does
        async with Runtime(state_dir=tmp_path, cgroup_root=runtime.cgroups.root) as second:
            container = await second.reconnect(first.directory)
            assert (container.pid, container.state) == (first.pid, State.RUNNING)
            assert container.spec == first.spec
            assert await second.collect_leftovers([container.id]) == []
            assert container.stdin is not None
            os.write(container.stdin, b"two\n")
            assert await read(container.stdout) == "one\ngot two\n"
            assert await container.wait() == Exit(4)
            await container.destroy()

    async def test_output_and_exit_of_one_that_ended_meanwhile(self, runtime: Runtime, spec: Make) -> None:
        first = await started(runtime, spec("sleep 0.2; echo unheard; exit 7"))
        first.close()
        async with asyncio.timeout(5):
            while not (first.directory / "exit").exists():
                await asyncio.sleep(0.01)
        container = await runtime.reconnect(first.directory)
        assert (container.state, container.pid, await container.wait()) == (State.ENDED, 0, Exit(7))
        assert await read(container.stdout) == "unheard\n"
        assert await read(container.stderr) == ""
        await container.destroy()

    async def test_a_pipe_full_of_unheard_output_is_kept(self, runtime: Runtime, spec: Make) -> None:
        first = await started(runtime, spec("head -c 200000 /dev/zero; exit 7"))
        first.close()
        async with asyncio.timeout(5):
            while not (first.directory / "exit").exists():
                await asyncio.sleep(0.01)
        container = await runtime.reconnect(first.directory)
        assert await container.wait() == Exit(7)
        assert len(await read(container.stdout)) == 200_000
        await container.destroy()

    async def test_one_that_waits_for_resume(self, runtime: Runtime, spec: Make) -> None:
        first = await runtime.create(spec("exit 2"))
        first.close()
        container = await runtime.reconnect(first.directory)
        assert container.state is State.CREATED
        await container.resume()
        assert await container.wait() == Exit(2)
        await container.destroy()

    async def test_killed_unseen_is_lost_and_collected(self, runtime: Runtime, spec: Make) -> None:
        first = await started(runtime, spec("sleep 100", network=network(21)))
        first.close()
        os.kill(first.pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
        with pytest.raises(ContainerLost):
            await runtime.reconnect(first.directory)
        assert await runtime.collect_leftovers([]) == [first.id]
        async with asyncio.timeout(5):
            while "vflynn" in [name[:6] for _, name in socket.if_nameindex()]:
                await asyncio.sleep(0.02)

    async def test_one_frozen_by_a_daemon_that_died_killing_it(self, runtime: Runtime, spec: Make) -> None:
        first = await started(runtime, spec("sleep 100"))
        first.close()
        runtime.cgroups._set_freezer("user", first.id, "FROZEN")
        container = await runtime.reconnect(first.directory)
        assert container.state is State.RUNNING
        await container.destroy()

    async def test_nothing_there_is_lost(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises(ContainerLost):
            await runtime.reconnect(tmp_path / "none")

    async def test_long_paths(self, runtime: Runtime, spec: Make, tmp_path: Path) -> None:
        first = await started(runtime, spec("exit 0", directory=str(tmp_path / ("d" * 120) / "job")))
        await first.wait()
        await first.destroy()

    async def test_a_dead_zygote_is_replaced(self, runtime: Runtime, spec: Make) -> None:
        assert runtime._zygote is not None
        os.kill(runtime._zygote._process.pid, signal.SIGKILL)
        assert (await run(runtime, spec("echo again")))[1] == "again\n"

    async def test_a_full_pipe_blocks_only_the_job(self, runtime: Runtime, spec: Make) -> None:
        container = await started(runtime, spec("head -c 300000 /dev/zero; echo done"))
        await asyncio.sleep(0.2)
        assert container.state is State.RUNNING
        assert len(await read(container.stdout)) == 300005
        assert await container.wait() == Exit(0)
        await container.destroy()


async def test_version_2_groups(spec: Make, tmp_path: Path) -> None:
    """As far as a hybrid machine shows it: its unified hierarchy has no controllers, but processes, views and kill."""
    unified = re.search(r" (\S+) \S+ - cgroup2 ", Path("/proc/self/mountinfo").read_text())
    if unified is None:
        pytest.skip("no cgroup2 is mounted")
    # As on a kernel that takes no programs about devices; `test_cgroups_v2` is about one that does.
    layout = Layout({}, unified[1], frozenset(), device_programs=False)
    runtime = Runtime(state_dir=tmp_path, cgroup_root=f"flynn-test2-{os.getpid()}", layout=layout)
    async with runtime:
        done, out, _ = await run(runtime, spec("ls /sys/fs/cgroup/cgroup.procs; mknod /tmp/null c 1 3 || exit 4"))
        assert (done, out) == (Exit(4), "/sys/fs/cgroup/cgroup.procs\n")
        container = await started(runtime, spec("sleep 100 & sleep 100"))
        assert len(runtime.cgroups.pids("user", container.id)) >= 2
        await container.kill()
        assert await container.wait() == Exit(137, 9)
        container.close()
        assert await runtime.collect_leftovers([]) == [container.id]
        runtime.cgroups.remove_all()


async def test_stats(runtime: Runtime, spec: Make) -> None:
    container = await started(runtime, spec("sleep 100", limits=Limits(memory_bytes=64 << 20)))
    stats = container.stats()
    assert stats.processes >= 2
    assert stats.memory_limit_bytes == 64 << 20
    assert 0 < stats.memory_bytes < 64 << 20
    await container.destroy()
    assert container.stats().processes == 0


def test_spec_survives_json(spec: Make) -> None:
    original = spec(
        network=network(5), mounts=(Mount(target="/a", source="/b"),), limits=Limits(fds=(1, 2)), env={"A": "b"}, uid=5
    )
    assert from_json(to_json(original, 2)) == original
