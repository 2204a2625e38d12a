"""One way to be a process: signals, readiness, failures."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from flynn.aio.supervisor import supervisor
from flynn.daemon import ConfigError, run
"""


def daemon(body: str) -> subprocess.Popen[str]:
    script = PRELUDE + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"{word!r} never came")


def test_sigterm_is_an_orderly_exit() -> None:
    process = daemon("""
        @asynccontextmanager
        async def service():
            async with supervisor() as spawn:
                spawn("wait", asyncio.Event().wait())
                try:
                    yield
                finally:
                    print("left", flush=True)
        run("test", service)
    """)
    with process:
        wait_for_line(process, "ready")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "left" in out


def test_a_signal_during_the_start_ends_it() -> None:
    process = daemon("""
        @asynccontextmanager
        async def service():
            print("starting", flush=True)
            await asyncio.sleep(3600)
            yield
        run("test", service)
    """)
    with process:
        wait_for_line(process, "starting")
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('raise ConfigError("PORT: not a number")', "test: PORT: not a number"),
        ('raise OSError("no such device")', ""),
    ],
)
def test_a_start_that_fails_is_exit_status_one(body: str, text: str) -> None:
    process = daemon(f"""
        @asynccontextmanager
        async def service():
            {body}
            yield
        run("test", service)
    """)
    with process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert text in err


def test_a_task_that_fails_ends_the_daemon() -> None:
    process = daemon("""
        async def fails():
            await asyncio.sleep(0.05)
            raise RuntimeError("a bug")
        @asynccontextmanager
        async def service():
            async with supervisor() as spawn:
                spawn("fragile", fails())
                yield
        run("test", service)
    """)
    with process:
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "a bug" in out


def test_an_exit_that_hangs_is_cut_off() -> None:
    process = daemon("""
        @asynccontextmanager
        async def service():
            yield
            await asyncio.sleep(3600)
        run("test", service, grace=timedelta(seconds=0.2))
    """)
    with process:
        wait_for_line(process, "ready")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 1
