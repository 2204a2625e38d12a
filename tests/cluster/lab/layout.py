"""Where the parts of the development cluster are. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
BASE = Path("/var/lib/flynn-dev")  # state of all nodes; on one shared mount, so that nodes see the volumes of ZFS
CACHE = Path("/var/cache/flynn")
IMAGES = REPO / "build" / "images"
PUBLISHED = REPO / ".cluster"  # what users of the cluster read

DOMAIN = "flynn.test"
BRIDGE = "flynndev"
TABLE = "flynndev"  # our table of nftables on the machine
GATEWAY = "198.51.100.1"  # TEST-NET-2: documentation addresses, in nobody's way
PREFIX = 24
DISK_BYTES = 12 << 30  # of each node, taken from the machine's as it is written; 70 % of it are for volumes
NETWORK = "198.51.100.0/24"
SITES = ("controller", "git", "images", "status")  # names under the domain that always exist


@dataclass(frozen=True, slots=True)
class Node:
    """Node `number` (from 0) of the development cluster."""

    number: int

    @property
    def id(self) -> str:
        return f"node{self.number + 1}"

    @property
    def ip(self) -> str:
        return f"198.51.100.{11 + self.number}"

    @property
    def namespace(self) -> str:
        return f"flynn-{self.id}"

    @property
    def link(self) -> str:
        """The machine's end of the node's cable."""
        return f"fl-{self.id}"

    @property
    def pool(self) -> str:
        return f"flynn-dev-{self.id}"

    @property
    def cgroup(self) -> str:
        return f"flynn-dev-{self.id}"

    @property
    def root(self) -> Path:
        return BASE / self.id

    @property
    def disk(self) -> Path:
        """The image of the node's own file system, which is mounted at `root`."""
        return BASE / f"{self.id}.ext4"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def volumes(self) -> Path:
        """Where flynn-host has its volumes mounted."""
        return self.state / "volumes"

    @property
    def config(self) -> Path:
        return self.root / "etc"

    @property
    def pidfile(self) -> Path:
        return self.root / "init.pid"

    @property
    def console(self) -> Path:
        """What the node's init and flynn-host print."""
        return self.root / "console.log"

    @property
    def resolv_conf(self) -> Path:
        return self.root / "resolv.conf"

    @property
    def hosts_file(self) -> Path:
        return self.root / "hosts"


def nodes(count: int) -> list[Node]:
    return [Node(number) for number in range(count)]


def names(domain: str, apps: tuple[str, ...] = ()) -> list[str]:
    return [domain, *(f"{site}.{domain}" for site in (*SITES, *apps))]
