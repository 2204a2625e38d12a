"""Runs inside a container as its job: tries what the arguments name and prints one JSON object, attempt -> outcome.

An outcome is the name of an errno, or a word for what became of the attempt; "succeeded ..." is an escape.
Each attempt has a process of its own, so that none spoils the next. Nothing here would do harm if it were let through.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import pty
import signal
import socket
import struct
import sys
import time

PARAMETERS = json.loads(os.environ["ATTACK"])
NUMBERS = PARAMETERS["numbers"]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWCGROUP, SIGCHLD = 0x10000000, 0x20000, 0x40000000, 0x2000000, 17


class Outcome(Exception):
    """How an attempt ended, other than by an errno."""


def call(name, *arguments):
    number = NUMBERS[name] if isinstance(name, str) else name
    words = [argument if isinstance(argument, bytes) else ctypes.c_long(argument) for argument in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    if name == "clone" and result == 0:
        os._exit(0)
    return result


def calls(name, *arguments):
    return lambda: call(name, *arguments)


def opens(path, flags=os.O_RDONLY):
    def attempt():
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
        return os.read(fd, 16) if flags == os.O_RDONLY else fd

    return attempt


def writes(path, text="1"):
    def attempt():
        fd = os.open(path, os.O_WRONLY)
        return os.write(fd, text.encode())

    return attempt


def device(kind, major, minor):
    """Make a device file and open it for reading."""

    def attempt():
        path = f"/tmp/device-{os.getpid()}"
        os.mknod(path, 0o600 | kind, os.makedev(major, minor))
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)

    return attempt


def block(major, minor):
    return device(0o060000, major, minor)


def char(major, minor):
    return device(0o020000, major, minor)


def empty(path):
    def attempt():
        with open(path, "rb") as file:
            if not file.read(64):
                raise Outcome("empty")
        return "has contents"

    return attempt


def tun():
    path = f"/tmp/tun-{os.getpid()}"
    os.mknod(path, 0o020600, os.makedev(10, 200))
    fd = os.open(path, os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH14x", b"escape0", 0x1002))


def kallsyms():
    with open("/proc/kallsyms") as file:
        lines = [file.readline() for _ in range(100)]
    if not any(line.split()[0].strip("0") for line in lines if line.strip()):
        raise Outcome("empty")


def kill_init():
    os.kill(1, signal.SIGKILL)
    time.sleep(0.1)
    os.kill(1, 0)
    raise Outcome("no effect")  # or nobody would be left to say so


def kill_everything_else():
    os.kill(PARAMETERS["victim"], 0)


def other_environments():
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if b"VICTIM-SECRET" in file.read():
                found.append(name)
    if not found:
        raise Outcome("not there")


def inherited_descriptors():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += [os.readlink(f"/proc/self/fd/{fd}")] if int(fd) > 2 else []
    leaked = [name for name in found if not name.startswith(("/proc/", "pipe:"))]
    standard = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
    if not leaked and all(name.startswith(("/dev/null", "pipe:")) for name in standard):
        raise Outcome("not there")
    return leaked + standard


def chroot_breakout():
    """The classic: keep a descriptor of the outer root, chroot below it, walk up."""
    os.makedirs("/tmp/jail/jail", exist_ok=True)
    outer = os.open("/", os.O_RDONLY)
    os.chroot("/tmp/jail")
    os.chroot("jail") if os.path.exists("jail") else None
    os.fchdir(outer)
    for _ in range(64):
        os.chdir("..")
    os.chroot(".")
    if os.path.exists(PARAMETERS["marker"]):
        return "the host's files"
    raise Outcome("container root")


def symlink_to_host():
    for fd in range(64):
        for way in ("self", "1"):
            if os.path.exists(f"/proc/{way}/fd/{fd}/../../../../../../../../{PARAMETERS['marker']}"):
                return f"/proc/{way}/fd/{fd}"
    raise Outcome("not there")


def setns(kind):
    def attempt():
        fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        call("setns", fd, 0)

    return attempt


def process_vm_readv():
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(buffer), 8)
    call("process_vm_readv", 1, local, 1, local, 1, 0)


def pidfd_getfd():
    fd = os.pidfd_open(1)
    call("pidfd_getfd", fd, 0, 0)


def shocker():
    """open_by_handle_at with the handle of inode 2, the root of most file systems."""
    mount = os.open("/", os.O_RDONLY)
    call("open_by_handle_at", mount, struct.pack("IiQ", 8, 1, 2), os.O_RDONLY)


def capset():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    if libc.capset(header, data) < 0:
        raise OSError(ctypes.get_errno(), "capset")


def status_field(name, expected):
    def attempt():
        with open("/proc/self/status") as file:
            value = next(line.split()[1] for line in file if line.startswith(name + ":"))
        if value == expected:
            raise Outcome("as configured")
        return value

    return attempt


def int80():
    """mount(2) by its 32-bit entry, whose numbers a careless filter does not know."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x15\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()


def terminal_ioctl(request):
    def attempt():
        pid, master = pty.fork()
        if pid == 0:
            try:
                fcntl.ioctl(0, request, b"x")
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        os.close(master)
        if number := os.waitstatus_to_exitcode(status):
            raise OSError(number, "ioctl")

    return attempt


def abstract_socket():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + PARAMETERS["abstract"])


def change_address():
    """SIOCSIFADDR: take a system job's address, and with it its rights."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        address = struct.pack("16sH2x4s8x", b"eth0", socket.AF_INET, socket.inet_aton("100.101.7.3"))
        fcntl.ioctl(handle, 0x8916, address)


def device_from_image():
    return os.open("/hostile-disk", os.O_RDONLY)


def setuid_program():
    pid = os.fork()
    if pid == 0:
        os.execv("/suid-python", ["python", "-c", "import os; os._exit(77 if os.geteuid() == 0 else 3)"])
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3:
        raise Outcome("no new rights")


def interpreter_overwrite():
    """Started as `#!/proc/self/exe`: this process is then the runtime's own program on the host (CVE-2019-5736)."""
    return os.open("/proc/self/exe", os.O_WRONLY)


def fork_bomb():
    children = []
    try:
        for _ in range(1000):
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            children.append(pid)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def fd_bomb():
    kept = []
    for _ in range(100_000):
        kept.append(os.dup(0))


def memory_bomb():
    pid = os.fork()
    if pid == 0:
        kept = []
        while True:
            kept.append(b"x" * (1 << 20))
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raise Outcome("killed by SIGKILL" if number == -9 else f"succeeded: {number}")


def fill(path, limit):
    def attempt():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(limit >> 20):
                if os.write(fd, b"x" * (1 << 20)) == 0:
                    return
        finally:
            os.unlink(path)

    return attempt


def connect(address, port):
    def attempt():
        with socket.socket() as client:
            client.settimeout(3)
            client.connect((address, port))

    return attempt


def checksum(data):
    total = sum(array.array("H", data + b"\0" * (len(data) % 2)))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def forge(source_ip, text, *, own_mac=True):
    """Send one UDP datagram to the victim as a hand-made frame."""
    victim = PARAMETERS["victim_ip"]
    with open("/sys/class/net/eth0/address") as file:
        mine = bytes.fromhex(file.read().strip().replace(":", ""))
    source_mac = mine if own_mac else b"\xfe\x00" + socket.inet_aton(source_ip)
    udp = struct.pack("!HHHH", 4000, 9999, 8 + len(text), 0) + text
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    head += socket.inet_aton(source_ip) + socket.inet_aton(victim)
    (short,) = struct.unpack("H", struct.pack("H", checksum(head)))
    head = head[:10] + struct.pack("H", short) + head[12:]
    frame = b"\xfe\x00" + socket.inet_aton(victim) + source_mac + b"\x08\x00" + head + udp
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        raw.send(frame)


def frames():
    """Send a genuine datagram and forged ones, then false ARP answers. The victim says what arrived."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("100.102.7.1", 53))
        mine = probe.getsockname()[0]
    forge(mine, b"genuine")
    forge("100.102.7.77", b"forged address")
    forge("100.102.7.77", b"forged address and mac", own_mac=False)
    with open("/sys/class/net/eth0/address") as file:
        mac = bytes.fromhex(file.read().strip().replace(":", ""))
    victim_mac = b"\xfe\x00" + socket.inet_aton(PARAMETERS["victim_ip"])
    arp = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + mac + socket.inet_aton("100.102.7.1")
    arp += victim_mac + socket.inet_aton(PARAMETERS["victim_ip"])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for target in (victim_mac, b"\xff" * 6):
            raw.send(target + mac + b"\x08\x06" + arp)
    time.sleep(0.2)
    forge(mine, b"end")
    raise Outcome("sent")


def victim():
    """Print which datagrams came, and whom this job believes to be the gateway."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 9999))
        with contextlib.suppress(OSError):
            server.sendto(b"who are you", ("100.102.7.1", 53))  # so that there is an ARP entry to be poisoned
        server.settimeout(20)
        came = []
        print("listening", flush=True)
        while (text := server.recv(100).decode()) != "end":
            came.append(text)
    with open("/proc/net/arp") as file:
        gateway = next((line.split()[3] for line in file if line.startswith("100.102.7.1 ")), "none")
    print(json.dumps({"came": came, "gateway": gateway}), flush=True)


READ_WRITE = os.O_RDWR
ATTEMPTS = {
    "mount a tmpfs": calls("mount", b"x", b"/tmp", b"tmpfs", 0, 0),
    "remount /sys writable": calls("mount", b"", b"/sys", b"", 0x1020, 0),
    "bind /proc/sys elsewhere": calls("mount", b"/proc", b"/tmp", b"", 0x1000, 0),
    "umount /proc/kcore": calls("umount2", b"/proc/kcore", 0),
    "pivot_root": calls("pivot_root", b"/tmp", b"/tmp"),
    "open_tree": calls("open_tree", -100, b"/", 1),
    "move_mount": calls("move_mount", -100, b"/proc", -100, b"/tmp", 0),
    "fsopen": calls("fsopen", b"proc", 0),
    "mount_setattr": calls("mount_setattr", -100, b"/sys", 0, b"\0" * 32, 32),
    "unshare user namespace": calls("unshare", CLONE_NEWUSER),
    "unshare mount namespace": calls("unshare", CLONE_NEWNS),
    "unshare network namespace": calls("unshare", CLONE_NEWNET),
    "unshare cgroup namespace (release_agent)": calls("unshare", CLONE_NEWCGROUP),
    "clone into a user namespace": calls("clone", CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0),
    "clone3 into a user namespace": calls("clone3", struct.pack("11Q", CLONE_NEWUSER, 0, 0, 0, SIGCHLD, *[0] * 6), 88),
    "setns to a mount namespace": setns("mnt"),
    "setns to init's namespaces": opens("/proc/1/ns/mnt"),
    "mount(2) by its x32 number": calls(0x40000000 | 165, b"x", b"/tmp", b"tmpfs", 0, 0),
    "mount(2) by int 0x80": int80,
    "ptrace init": calls("ptrace", 16, 1, 0, 0),
    "process_vm_readv of init": process_vm_readv,
    "pidfd_getfd of init": pidfd_getfd,
    "kcmp with init": calls("kcmp", 1, os.getpid(), 0, 0, 0),
    "read init's memory": opens("/proc/1/mem"),
    "read init's environment": opens("/proc/1/environ"),
    "init's descriptors": lambda: [os.readlink(f"/proc/1/fd/{fd}") for fd in os.listdir("/proc/1/fd")],
    "init's root": lambda: os.listdir("/proc/1/root"),
    "init's working directory": lambda: os.listdir("/proc/1/cwd/"),
    "kill init": kill_init,
    "signal another job's process": kill_everything_else,
    "read other jobs' environment": other_environments,
    "add_key": calls("add_key", b"user", b"x", b"y", 1, -3),
    "request_key": calls("request_key", b"user", b"x", 0, -3),
    "keyctl": calls("keyctl", 0, -3, 0),
    "kexec_load": calls("kexec_load", 0, 0, 0, 0),
    "kexec_file_load": calls("kexec_file_load", -1, -1, 0, 0, 0),
    "init_module": calls("init_module", 0, 0, b""),
    "finit_module": calls("finit_module", -1, b"", 0),
    "delete_module": calls("delete_module", b"none", 0),
    "bpf": calls("bpf", 0, 0, 0),
    "perf_event_open": calls("perf_event_open", 0, 0, -1, -1, 0),
    "userfaultfd": calls("userfaultfd", 0),
    "io_uring_setup": calls("io_uring_setup", 1, b"\0" * 120),
    "fanotify_init": calls("fanotify_init", 0, 0),
    "reboot": calls("reboot", 0, 0, 0, 0),
    "swapon": calls("swapon", b"/none", 0),
    "swapoff": calls("swapoff", b"/none"),
    "settimeofday": calls("settimeofday", 0, 0),
    "clock_settime": calls("clock_settime", 0, 0),
    "adjtimex": calls("adjtimex", 0),
    "sethostname": calls("sethostname", b"x", 1),
    "setdomainname": calls("setdomainname", b"x", 1),
    "iopl": calls("iopl", 3),
    "ioperm": calls("ioperm", 0x70, 1, 1),
    "modify_ldt": calls("modify_ldt", 0, 0, 0),
    "quotactl": calls("quotactl", 0x80000700, b"/dev/x", 0, 0),
    "acct": calls("acct", b"/tmp/none"),
    "syslog (dmesg)": calls("syslog", 10, 0, 0),
    "vhangup": calls("vhangup"),
    "move_pages": calls("move_pages", 1, 0, 0, 0, 0, 0),
    "open_by_handle_at (shocker)": shocker,
    "TIOCSTI": terminal_ioctl(0x5412),
    "TIOCLINUX": terminal_ioctl(0x541C),
    "socket to the hypervisor (AF_VSOCK)": lambda: socket.socket(40, socket.SOCK_STREAM),
    "socket AF_ALG": lambda: socket.socket(38, socket.SOCK_SEQPACKET),
    "socket AF_RDS": lambda: socket.socket(21, socket.SOCK_SEQPACKET),
    "the machine's disk": lambda: block(*PARAMETERS["disk"])(),
    "device file in the image": device_from_image,
    "/dev/mem": char(1, 1),
    "/dev/port": char(1, 4),
    "/dev/kmsg": char(1, 11),
    "/dev/loop0": block(7, 0),
    "/dev/loop-control": char(10, 237),
    "/dev/fuse": char(10, 229),
    "/dev/kvm": char(10, 232),
    "/dev/uinput": char(10, 223),
    "the machine's console": char(5, 1),
    "the machine's tty1": char(4, 1),
    "the machine's serial line": char(4, 64),
    "a terminal of the host": char(136, 0),
    "a tun interface": tun,
    "/proc/sysrq-trigger": writes("/proc/sysrq-trigger", "h"),
    "/proc/sys/kernel/core_pattern": writes("/proc/sys/kernel/core_pattern", "core"),
    "/proc/sys/kernel/modprobe": writes("/proc/sys/kernel/modprobe", "/sbin/modprobe"),
    "/proc/sys/vm/drop_caches": writes("/proc/sys/vm/drop_caches", "0"),
    "/proc/irq": writes("/proc/irq/default_smp_affinity", "f"),
    "/proc/kcore": empty("/proc/kcore"),
    "/proc/kallsyms": kallsyms,
    "/proc/keys": empty("/proc/keys"),
    "/proc/timer_list": empty("/proc/timer_list"),
    "/proc/kpagecount": empty("/proc/kpagecount"),
    "/proc/vmallocinfo": empty("/proc/vmallocinfo"),
    "/proc/kmsg": opens("/proc/kmsg"),
    "protection from the OOM killer": writes("/proc/self/oom_score_adj", "-1000"),
    "/sys/kernel/uevent_helper": writes("/sys/kernel/uevent_helper", "/x"),
    "/sys: create": lambda: os.mkdir("/sys/kernel/x"),
    "/sys/power/state": writes("/sys/power/state", "none"),
    "/sys/module parameters": writes("/sys/module/printk/parameters/time", "Y"),
    "debugfs": lambda: os.stat("/sys/kernel/debug/tracing"),
    "cgroup: raise the memory limit": writes("/sys/fs/cgroup/memory/memory.limit_in_bytes", "-1"),
    "cgroup: allow all devices": writes("/sys/fs/cgroup/devices/devices.allow", "a"),
    "cgroup: release_agent": writes("/sys/fs/cgroup/memory/release_agent", "/x"),
    "cgroup: make a group": lambda: os.mkdir("/sys/fs/cgroup/memory/x"),
    "cgroup: leave for the parent": writes("/sys/fs/cgroup/memory/../cgroup.procs", "0"),
    "gain all capabilities": capset,
    "capabilities, effective": lambda: status_field("CapEff", PARAMETERS["capabilities"])(),
    "capabilities, bounding": lambda: status_field("CapBnd", PARAMETERS["capabilities"])(),
    "no_new_privs is set": status_field("NoNewPrivs", "1"),
    "seccomp filters": status_field("Seccomp", "2"),
    "chroot, and out by a descriptor": chroot_breakout,
    "the host by /proc/*/fd": symlink_to_host,
    "inherited descriptors": inherited_descriptors,
    "abstract socket of the host": abstract_socket,
    "take a system job's address": change_address,
    "setuid program": setuid_program,
    "write to the runtime's own program": interpreter_overwrite,
    "fork bomb": fork_bomb,
    "descriptor bomb": fd_bomb,
    "memory bomb": memory_bomb,
    "/dev/shm bomb": fill("/dev/shm/bomb", 200 << 20),
    "disk bomb": fill("/tmp/bomb", 300 << 20),
    "forged frames": frames,
    **{
        f"{what}, port {port}": connect(address, port)
        for what, address in PARAMETERS.get("addresses", {}).items()
        for port in PARAMETERS.get("ports", ())
    },
}


def outcome(attempt):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(15)
        try:
            text = f"succeeded: {attempt()!r}"
        except Outcome as end:
            text = str(end)
        except OSError as error:
            text = errno.errorcode.get(error.errno, str(error))
        except BaseException as error:
            text = f"broken attempt: {error!r}"
        os.write(writer, text[:500].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text or f"killed by {signal.Signals(-number).name}"


if __name__ == "__main__":
    if PARAMETERS["attempts"] == ["victim"]:
        victim()
    else:
        json.dump({name: outcome(ATTEMPTS[name]) for name in PARAMETERS["attempts"]}, sys.stdout)
