"""The first process of a node: mounts what is the node's own, keeps flynn-host running, reaps orphans.

It stands in for systemd: `Restart=always` with a second in between, SIGTERM passed on for an orderly end.
Arguments: the node's resolv.conf, its hosts file, then the command to keep running. Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

RESTART_SECONDS = 1.0


def main() -> None:
    resolv_conf, hosts, *command = sys.argv[1:]
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
