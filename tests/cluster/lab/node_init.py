"""The first process of a node: mounts what is the node's own, keeps flynn-host running, reaps orphans.

It stands in for systemd: `Restart=always` with a second in between, SIGTERM passed on for an orderly end.
Arguments: the directory whose mounts are shared with the machine, the node's resolv.conf, its hosts file, then the
command to keep running. Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

RESTART_SECONDS = 1.0


def keep_mounts_inside(volumes: str) -> None:
    """Let no mount made here be seen outside, except those of volumes: zfs-fuse, outside, must see them unmounted."""
    with open("/proc/self/mountinfo") as mounts:
        places = {line.split()[4] for line in mounts}
    for place in places:
        if place != volumes and not place.startswith(f"{volumes}/"):
            subprocess.run(["mount", "--make-slave", place], check=False, stderr=subprocess.DEVNULL)


def main() -> None:
    volumes, resolv_conf, hosts, *command = sys.argv[1:]
    keep_mounts_inside(volumes)
    for source, target in ((resolv_conf, "/etc/resolv.conf"), (hosts, "/etc/hosts")):
        subprocess.run(["mount", "--bind", source, os.path.realpath(target)], check=True)
    ending = False
    daemon = 0

    def end(signum: int, frame: object) -> None:
        nonlocal ending
        ending = True
        if daemon:
            os.kill(daemon, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    while not ending:
        daemon = subprocess.Popen(command).pid
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                break
            if pid == daemon:
                code = os.waitstatus_to_exitcode(status)
                print(f"init: {command[0]} ended with status {code}", flush=True)
                break
        daemon = 0
        if not ending:
            time.sleep(RESTART_SECONDS)


if __name__ == "__main__":
    main()
