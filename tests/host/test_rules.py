"""The pure rules of jobs: life cycle, admission, environment, retention, coming back, partitions, health."""

from __future__ import annotations

from dataclasses import replace as changed
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.daemon import ConfigError
from flynn.host.config import configured, parse_tags, read_host_file
from flynn.host.jobs import admission, environment, partitions, resurrection, retention
from flynn.host.jobs.container import Prepared, container_spec, limits, scratch_bytes
from flynn.host.jobs.environment import HostFacts
from flynn.host.jobs.lifecycle import (
    AddressAssigned,
    Broken,
    ContainerMade,
    Ended,
    Happening,
    ImpossibleTransition,
    Launched,
    StopAsked,
    Withdrawn,
    advance,
    created,
)
from flynn.host.jobs.profiles import Extras
from flynn.host.main import cli
from flynn.host.networking import Subnet
from flynn.host.runtime.spec import DEFAULT_CAPABILITIES, Limits
from flynn.host.services.health import Change, Check, Health, UnknownCheck, observe, pause
from flynn.types.app import HANDS_OVER, SYSTEM_APP
from flynn.types.codec import Json, Nanoseconds, convert, encode, replace
from flynn.types.errors import Conflict, ValidationError
from flynn.types.host import (
    META_APP,
    ActiveJob,
    ContainerConfig,
    HostJob,
    JobEventKind,
    JobStatus,
    Mountspec,
    NetworkConfig,
    VolumeBinding,
)
from flynn.types.release import HealthCheck, Mount, Port
from flynn.types.resources import Limit

NOW = datetime(2026, 1, 5, 10, 0, tzinfo=UTC)
JOB = HostJob(id="h-1", mountspecs=[Mountspec(type="squashfs", id="l")])
STARTING = created(JOB, "h", NOW)
RUNNING = advance(STARTING, Launched(), NOW)[0]

# Life cycle


@pytest.mark.parametrize(
    ("before", "happening", "status", "event"),
    [
        pytest.param(STARTING, Launched(), JobStatus.RUNNING, JobEventKind.START, id="it runs"),
        pytest.param(RUNNING, Ended(0), JobStatus.DONE, JobEventKind.STOP, id="success"),
        pytest.param(RUNNING, Ended(3), JobStatus.CRASHED, JobEventKind.STOP, id="failure"),
        pytest.param(RUNNING, Ended(137, 9), JobStatus.CRASHED, JobEventKind.STOP, id="killed by a stranger"),
        pytest.param(
            replace(RUNNING, force_stop=True), Ended(143, 15), JobStatus.DONE, JobEventKind.STOP, id="died as asked"
        ),
        pytest.param(
            replace(RUNNING, force_stop=True),
            Ended(1),
            JobStatus.CRASHED,
            JobEventKind.STOP,
            id="failed on its way out",
        ),
        pytest.param(STARTING, Ended(0), JobStatus.DONE, JobEventKind.STOP, id="too short to be seen running"),
        pytest.param(STARTING, Broken("x"), JobStatus.FAILED, JobEventKind.ERROR, id="cannot start"),
        pytest.param(RUNNING, Broken("x"), JobStatus.FAILED, JobEventKind.ERROR, id="lost"),
        pytest.param(STARTING, Withdrawn(), JobStatus.DONE, JobEventKind.STOP, id="stopped before it had a container"),
    ],
)
def test_transitions(before: ActiveJob, happening: Happening, status: JobStatus, event: JobEventKind) -> None:
    after, published = advance(before, happening, NOW)
    assert (after.status, published) == (status, event)
    assert (after.ended_at == NOW) == status.down


HAPPENINGS: list[Happening] = [
    AddressAssigned(JOB, "1.2.3.4"), ContainerMade(7), Launched(), Ended(0), Broken("x"), StopAsked(), Withdrawn(),
]  # fmt: skip


@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: type(happening).__name__)
@pytest.mark.parametrize("status", [JobStatus.DONE, JobStatus.CRASHED, JobStatus.FAILED])
def test_down_is_final(status: JobStatus, happening: Happening) -> None:
    with pytest.raises(ImpossibleTransition):
        advance(replace(STARTING, status=status), happening, NOW)


@pytest.mark.parametrize("happening", [AddressAssigned(JOB, "1.2.3.4"), ContainerMade(7), Launched(), Withdrawn()])
def test_what_belongs_to_the_start_cannot_happen_to_a_running_job(happening: Happening) -> None:
    with pytest.raises(ImpossibleTransition):
        advance(RUNNING, happening, NOW)


def test_a_starting_job_has_no_status_on_the_wire_but_all_its_times() -> None:
    assert encode(STARTING) == (
        b'{"job":{"id":"h-1","mountspecs":[{"type":"squashfs","id":"l"}],"config":{}},"host_id":"h",'
        b'"created_at":"2026-01-05T10:00:00Z","started_at":"0001-01-01T00:00:00Z","ended_at":"0001-01-01T00:00:00Z"}'
    )


# Admission


def bound(job_id: str, *volumes: str) -> HostJob:
    bindings = [VolumeBinding(target="/d", volume=volume) for volume in volumes]
    return HostJob(id=job_id, mountspecs=JOB.mountspecs, config=ContainerConfig(volumes=bindings))


def test_a_volume_is_free_again_when_its_job_is_down() -> None:
    holder = created(bound("h-1", "a", "b"), "h", NOW)
    with pytest.raises(Conflict, match="volumes in use: a, b"):
        admission.check(bound("h-2", "b", "a", "c"), {"h-1": holder})
    admission.check(bound("h-2", "a"), {"h-1": advance(holder, Broken("x"), NOW)[0]})


def test_a_job_of_the_platform_may_share_its_volume_with_its_successor() -> None:
    def one(job_id: str, **metadata: str) -> HostJob:
        meta = {META_APP: "d", SYSTEM_APP: "true", HANDS_OVER: "true", **metadata}
        return replace(bound(job_id, "a"), metadata={key: value for key, value in meta.items() if value})

    holder = created(one("h-1"), "h", NOW)
    admission.check(one("h-2"), {"h-1": holder})
    for stranger in ({META_APP: "e"}, {SYSTEM_APP: ""}, {HANDS_OVER: ""}):
        with pytest.raises(Conflict, match="volumes in use: a"):
            admission.check(one("h-2", **stranger), {"h-1": holder})


@pytest.mark.parametrize(
    ("job", "error"),
    [
        pytest.param(HostJob(id="h-1"), ValidationError, id="no layers"),
        pytest.param(replace(JOB, id=""), ValidationError, id="no id"),
        pytest.param(replace(JOB, id="../x"), ValidationError, id="an id that is a path"),
        pytest.param(JOB, Conflict, id="id taken"),
    ],
)
def test_refused(job: HostJob, error: type[Exception]) -> None:
    with pytest.raises(error):
        admission.check(job, {"h-1": STARTING})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"id": ".."}, "id", id="an id that is a path"),
        pytest.param({"id": "h-\u0660"}, "id", id="an id no cgroup can have"),
        pytest.param({"resources": {"memory": {"limit": -1}}}, "resources.memory.limit", id="a negative limit"),
        pytest.param({"config": {"ports": [{"port": 65536}]}}, "config.ports[0].port", id="a port beyond the last"),
        pytest.param({"config": {"uid": -1}}, "config.uid", id="a negative user"),
        pytest.param({"config": {"args": ["a", "b\0"]}}, "config.args[1]", id="a NUL in an argument"),
        pytest.param({"config": {"env": {"A=B": "c"}}}, "config.env", id="a variable that cannot be named so"),
        pytest.param({"config": {"mounts": [{"target": "/\0"}]}}, "config.mounts[0].target", id="a NUL in a mount"),
        pytest.param(
            {"config": {"allowed_devices": [{"type": 1}]}}, "config.allowed_devices[0].type", id="a device of no kind"
        ),
    ],
)
def test_values_no_kernel_takes_are_refused_by_the_name_of_their_field(fields: dict[str, Json], field: str) -> None:
    job = convert({"id": "h-2", "mountspecs": [{"type": "squashfs"}], **fields}, HostJob)
    with pytest.raises(ValidationError) as refusal:
        admission.check(job, {})
    assert refusal.value.detail == {"field": field}


# Environment


def test_a_port_that_is_taken_is_not_given_again() -> None:
    ports = [Port(proto="tcp"), Port(port=5004, proto="tcp"), Port(proto="udp"), Port(proto="tcp")]
    job = environment.with_ports(HostJob(config=ContainerConfig(ports=ports)), {5000, 5002})
    assert [port.port for port in job.config.ports] == [5001, 5004, 5003, 5005]
    assert job.config.env == {"PORT": "5001", "PORT_0": "5001", "PORT_1": "5004", "PORT_2": "5003", "PORT_3": "5005"}


def test_ports_get_numbers_and_variables() -> None:
    ports = [Port(proto="tcp"), Port(port=8080, proto="udp"), Port()]
    job = environment.with_ports(replace(JOB, config=ContainerConfig(ports=ports, env={"A": "b"})))
    assert [(port.port, port.proto) for port in job.config.ports] == [(5000, "tcp"), (8080, "udp"), (5002, "tcp")]
    assert job.config.env == {"A": "b", "PORT": "5000", "PORT_0": "5000", "PORT_1": "8080", "PORT_2": "5002"}


FACTS = HostFacts(host_id="h", external_ip="192.0.2.1")


def test_the_jobs_own_environment_wins_over_the_hosts_but_not_over_its_name() -> None:
    config = ContainerConfig(env={"PATH": "/x", "DISCOVERD": "none", "HOSTNAME": "y", "EXTERNAL_IP": "100.100.1.2"})
    env = environment.process_environment(replace(JOB, config=config), FACTS, "192.0.2.1:1111")
    assert env == {
        "PATH": "/x", "TERM": "xterm", "HOME": "/", "EXTERNAL_IP": "100.100.1.2", "LISTEN_IP": "",
        "DISCOVERD": "none", "HOSTNAME": "1", "container": "",
    }  # fmt: skip


def test_only_the_platforms_jobs_learn_about_host_and_identity() -> None:
    system = replace(JOB, metadata={"flynn-system-app": "true"})
    env = environment.process_environment(system, FACTS, None)
    assert (env["FLYNN_HOST_IP"], env["FLYNN_HOST_ID"]) == ("192.0.2.1", "h")
    assert env["FLYNN_IDENTITY"] == "/run/flynn/identity"


@pytest.mark.parametrize(("job_id", "name"), [("h-a-b", "a-b"), ("plain", "plain"), ("h-" + "x" * 70, "x" * 64)])
def test_host_names(job_id: str, name: str) -> None:
    assert environment.hostname(job_id) == name


# Containers

MADE = Prepared(
    directory=Path("/s/jobs/h-1"), lower=[Path("/l/1"), Path("/l/2")], writable=Path("/w"), network=None,
    volumes={"v": Path("/v/v")}, identity=Path("/s/jobs/h-1/identity"), resolv_conf="", discoverd=None,
)  # fmt: skip


def test_a_container_binds_mounts_volumes_and_identity_in_this_order() -> None:
    config = ContainerConfig(
        args=["web"],
        mounts=[Mount(location="/m", target="/host/m", writeable=True)],
        volumes=[VolumeBinding(target="/data", volume="v", writeable=False)],
        host_network=True,
    )
    spec = container_spec(replace(JOB, config=config), "user", FACTS, Extras(capabilities=("SYS_X",)), MADE)
    assert [(mount.target, mount.source, mount.writable) for mount in spec.mounts] == [
        ("/m", "/host/m", True),
        ("/data", "/v/v", False),
        ("/run/flynn/identity", "/s/jobs/h-1/identity", False),
    ]
    assert spec.rootfs.lower == ("/l/1", "/l/2")
    assert spec.capabilities == (*DEFAULT_CAPABILITIES, "NET_ADMIN", "SYS_X")
    assert (spec.cwd, spec.hosts) == ("/", "127.0.0.1 localhost 1\n")


def test_no_capabilities_is_not_the_default_capabilities() -> None:
    job = replace(JOB, config=ContainerConfig(linux_capabilities=[]))
    assert container_spec(job, "user", FACTS, Extras(), MADE).capabilities == ()


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        pytest.param({}, Limits(memory_bytes=1 << 30, pids=4096), id="memory is never unlimited"),
        pytest.param(
            {"cpu": Limit(limit=750), "memory": Limit(limit=5), "max_fd": Limit(request=10, limit=20)},
            Limits(memory_bytes=5, cpu_shares=768, pids=4096, fds=(10, 20)),
            id="cpu becomes shares",
        ),
        pytest.param({"cpu": Limit(limit=1)}, Limits(memory_bytes=1 << 30, cpu_shares=2, pids=4096), id="least share"),
        pytest.param(
            {"max_procs": Limit(limit=9)},
            Limits(memory_bytes=1 << 30, pids=10),
            id="processes are counted by the container, its init besides",
        ),
    ],
)
def test_limits(resources: dict[str, Limit], expected: Limits) -> None:
    assert limits(resources) == expected


def test_scratch_space() -> None:
    assert (scratch_bytes({}), scratch_bytes({"temp_disk": Limit(limit=7)})) == (100 << 20, 7)


# Retention


def down(job_id: str, app: str, minute: int) -> ActiveJob:
    job = replace(JOB, id=job_id, config=ContainerConfig(env={"FLYNN_APP_ID": app} if app else {}))
    return replace(created(job, "h", NOW), status=JobStatus.DONE, ended_at=NOW + timedelta(minutes=minute))


def test_the_oldest_down_jobs_of_each_app_are_retired() -> None:
    jobs = [down(f"a-{n}", "a", n) for n in range(27)] + [down(f"b-{n}", "", n) for n in range(25)]
    running = [replace(RUNNING, job=replace(JOB, id=f"r-{n}")) for n in range(30)]
    assert retention.to_retire([*jobs, *running]) == ["a-0", "a-1"]


# Coming back

PLATFORM = replace(
    RUNNING, job=replace(JOB, resurrect=True, config=ContainerConfig(env={"FLYNN_JOB_ID": "h-1"})), started_at=NOW
)


def test_a_successor_is_the_same_job_under_another_id() -> None:
    heir = resurrection.successor(PLATFORM, "h-2", NOW + timedelta(hours=1))
    assert heir.config.env == {"FLYNN_JOB_ID": "h-2"}
    assert heir.metadata == {"flynn-host.replaces": "h-1", "flynn-host.restarts": "0"}
    assert (heir.id, heir.resurrect, heir.mountspecs) == ("h-2", True, JOB.mountspecs)


def test_short_lives_make_the_waits_longer_and_a_long_one_forgives() -> None:
    waits, job = [], PLATFORM.job
    for number in range(9):
        life = replace(PLATFORM, job=job)
        job = resurrection.successor(life, f"h-{number}", NOW + timedelta(seconds=1))
        waits.append(resurrection.delay_before(job).total_seconds())
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    forgiven = resurrection.successor(replace(PLATFORM, job=job), "h-x", NOW + timedelta(seconds=61))
    assert resurrection.delay_before(forgiven) == timedelta()


def test_what_was_stopped_stays_stopped() -> None:
    assert resurrection.wanted(PLATFORM)
    assert not resurrection.wanted(replace(PLATFORM, force_stop=True))
    assert not resurrection.wanted(RUNNING)


def test_discoverd_and_flannel_are_started_first() -> None:
    jobs = [replace(RUNNING, job=replace(JOB, id=name), created_at=NOW + timedelta(seconds=n)) for n, name in
            enumerate(["pg", "web", "fl", "di"])]  # fmt: skip
    ordered = resurrection.start_order(jobs, {"discoverd": "di", "flannel": "fl"})
    assert [job.job.id for job in ordered] == ["di", "fl", "pg", "web"]


# Partitions, tags, configuration


def test_partitions() -> None:
    found = partitions.parse(partitions.DEFAULT_PARTITIONS + " extra=cpu_shares:2")
    assert found == {"system": 4096, "background": 4096, "user": 8192, "extra": 2}
    assert partitions.choose("", found) == "user"
    with pytest.raises(partitions.InvalidPartition, match='host: invalid job partition "x"'):
        partitions.choose("x", found)


@pytest.mark.parametrize(
    "text", ["", "user=cpu_shares:8192", "user", "a=b:3", partitions.DEFAULT_PARTITIONS + " x=cpu_shares:1"]
)
def test_bad_partitions(text: str) -> None:
    with pytest.raises(partitions.BadPartitions):
        partitions.parse(text)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", {}),
        ("foo", {"foo": "true"}),
        ("foo,", {"foo": "true"}),
        ("foo=", {"foo": ""}),
        ("foo=bar=baz", {"foo": "bar=baz"}),
        ("a=1,b,c=", {"a": "1", "b": "true", "c": ""}),
    ],
)
def test_tags(text: str, tags: dict[str, str]) -> None:
    assert parse_tags(text) == tags


def options(**given: object) -> dict[str, object]:
    daemon = cli.get_command(None, "daemon")  # type: ignore[arg-type]  # the context is not looked at
    assert daemon is not None
    defaults = {option.name or "": option.get_default(daemon.make_context("daemon", [])) for option in daemon.params}
    return {**defaults, "external_ip": "192.0.2.1", "id": "h", **given}


@pytest.mark.parametrize(
    ("given", "named"),
    [({"id": "a-b"}, "--id"), ({"external_ip": "x"}, "--external-ip"), ({"partitions": "x"}, "--partitions")],
)
def test_a_bad_flag_is_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        configured(options(**given), [])


def test_configuration_from_flags() -> None:
    config = configured(options(state_dir="/s", tags="a"), ["--tags", "a"])
    assert (config.identity_dir, config.key_file) == (Path("/s/identity"), Path("/etc/flynn/host.key"))
    assert (config.tags, config.flags) == ({"a": "true"}, ("--tags", "a"))


def test_host_json(tmp_path: Path) -> None:
    assert read_host_file(tmp_path, {}).args == ()
    (tmp_path / "host.json").write_text('{"args":["--id","x"],"env":{"A":"b"}}')
    assert read_host_file(tmp_path, {}).args == ("--id", "x")
    with pytest.raises(ConfigError, match="FLYNN_HOST_CONFIG"):
        read_host_file(tmp_path, {"FLYNN_HOST_CONFIG": str(tmp_path / "none")})
    (tmp_path / "host.json").write_text("{")
    with pytest.raises(ConfigError, match=r"host\.json"):
        read_host_file(tmp_path, {})


# Network


@pytest.mark.parametrize(
    ("config", "field"),
    [
        pytest.param(NetworkConfig(subnet=""), "subnet", id="nothing"),
        pytest.param(NetworkConfig(subnet="fd00::1/64"), "subnet", id="IPv6"),
        pytest.param(NetworkConfig(subnet="10.0.0.0/24"), "subnet", id="the network instead of the bridge"),
        pytest.param(NetworkConfig(subnet="10.0.0.255/24"), "subnet", id="the broadcast address"),
        pytest.param(NetworkConfig(subnet="10.0.0.1/31"), "subnet", id="no room"),
        pytest.param(NetworkConfig(subnet="10.0.0.1/24", mtu=-1), "mtu", id="mtu"),
        pytest.param(NetworkConfig(subnet="10.0.0.1/24", network="10.1.0.0/16"), "network", id="other overlay"),
    ],
)
def test_a_bad_network_is_the_callers_error(config: NetworkConfig, field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Subnet.parse(config)
    assert refused.value.field == field


# Health

CHECK = Check.of(HealthCheck(type="tcp"))


def history(outcomes: str, threshold: int = 2) -> str:
    state, changes = Health(), ""
    for outcome in outcomes:
        state, change = observe(state, outcome == "+", threshold)
        changes += {Change.UP: "U", Change.DOWN: "D", None: "."}[change]
    return changes


@pytest.mark.parametrize(
    ("outcomes", "changes"),
    [
        pytest.param("+", "U", id="the first success counts at once"),
        pytest.param("---+", "...U", id="also after failures"),
        pytest.param("+-+--", "U...D", id="one failure is forgiven"),
        pytest.param("+--+-++", "U.D...U", id="coming back takes the threshold, too"),
        pytest.param("-----", ".....", id="never up, never down"),
    ],
)
def test_health(outcomes: str, changes: str) -> None:
    assert history(outcomes) == changes


@given(st.text("+-", max_size=60), st.integers(1, 5))
def test_ups_and_downs_alternate_beginning_with_up(outcomes: str, threshold: int) -> None:
    changes = history(outcomes, threshold).replace(".", "")
    assert changes == ("UD" * len(changes))[: len(changes)]


def test_defaults_of_a_check() -> None:
    assert (CHECK.interval, CHECK.threshold, CHECK.status) == (timedelta(seconds=2), 2, 200)
    first = [pause(Health(against=failures), CHECK) / timedelta(milliseconds=1) for failures in range(1, 6)]
    assert first == [12.5, 25, 50, 100, 100]
    assert pause(Health(against=10**6), CHECK) == timedelta(milliseconds=100)
    assert pause(Health(up=True, ever_up=True), CHECK) == timedelta(seconds=2)
    custom = Check.of(HealthCheck(type="http", interval=Nanoseconds(5_000_000_000), threshold=7, status=302))
    assert (custom.interval, custom.threshold, custom.status) == (timedelta(seconds=5), 7, 302)
    assert changed(custom, threshold=2).threshold == 2
    with pytest.raises(UnknownCheck):
        Check.of(HealthCheck(type="icmp"))
