"""Volumes: directories that outlive jobs. `provider` says what a file system must offer, `zfs` is the real one."""
