"""One way to be a process: event loop, signals, readiness, orderly exit.

A daemon is an async context manager. Entering it binds, connects, replays state and registers; it is ready when it has
been entered. Leaving it undoes that in reverse order.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta

from flynn.log import configure

log = logging.getLogger(__name__)

GRACE = timedelta(seconds=20)  # below the 30 s that a host waits before it kills

_notify_socket = ""  # where systemd listens; set once, by `run`

ServiceFactory = Callable[[], AbstractAsyncContextManager[object]]


class ConfigError(Exception):
    """The process cannot start as configured; the message names the variable or flag."""


def run(
    component: str, service: ServiceFactory, *, grace: timedelta = GRACE, making_way: asyncio.Event | None = None
) -> None:
    """Be the daemon `component` until SIGINT or SIGTERM. Exit code 0 after an orderly exit, 1 after a failure.

    A daemon that sets `making_way` is left like one that is asked to stop, and this function returns: the caller lets
    another program have the process.
    """
    global _notify_socket
    configure(component)
    # Taken out of the environment: what this process starts must not speak for it.
    _notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
    try:
        _run_loop(service, grace, making_way)
    except ConfigError as error:
        sys.exit(f"{component}: {error}")
    except BaseException as error:
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        for cause in _leaves(error):
            if isinstance(cause, ConfigError):
                sys.exit(f"{component}: {cause}")
        log.critical("the daemon failed", exc_info=error)
        sys.exit(1)


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the program that takes this process over: it may speak to systemd in our place."""
    return {**inherited, "NOTIFY_SOCKET": _notify_socket} if _notify_socket else dict(inherited)


def notify(state: str) -> None:
    """Tell systemd (`Type=notify`) about this process, if it asked to be told. sd_notify(3)."""
    if not _notify_socket:
        return
    address = "\0" + _notify_socket[1:] if _notify_socket.startswith("@") else _notify_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd not told", extra={"state": state, "error": str(error)})


def _run_loop(service: ServiceFactory, grace: timedelta, making_way: asyncio.Event | None) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(service(), grace=grace, making_way=making_way))


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]


async def serve(
    service: AbstractAsyncContextManager[object], *, grace: timedelta, making_way: asyncio.Event | None = None
) -> None:
    """Run until SIGINT or SIGTERM (or until the service makes way), then allow `grace` for an orderly exit.

    The service is entered and left by this one task, so that a task group inside it can interrupt the wait.
    """
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    stop = asyncio.Event()
    ready = False

    def asked_to_stop() -> None:
        stop.set()
        if not ready:
            main.cancel()  # A signal during the start ends the start as well.

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, asked_to_stop)
    try:
        async with asyncio.timeout(None) as deadline, service:
            try:
                ready = True
                log.info("ready")
                notify("READY=1")
                # What lived through the start is permanent; the collector need not visit it again.
                gc.collect()
                gc.freeze()
                if await _first(stop, making_way) is stop:
                    log.info("stopping")
                    notify("STOPPING=1")
                else:
                    log.info("making way")
                    notify("RELOADING=1")  # READY=1 of the successor ends it
            finally:
                deadline.reschedule(loop.time() + grace.total_seconds())
    except asyncio.CancelledError:
        if not stop.is_set() or ready:
            raise


async def _first(stop: asyncio.Event, making_way: asyncio.Event | None) -> asyncio.Event:
    """Wait for either event; `stop` wins."""
    if making_way is None:
        await stop.wait()
        return stop
    loop = asyncio.get_running_loop()
    waits = [loop.create_task(event.wait()) for event in (stop, making_way)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return stop if stop.is_set() else making_way
