"""From release to host job."""

from flynn.jobspec import entrypoint, formation_job, mountspecs, one_off_job, split_job_id, with_legacy_defaults
from flynn.types.app import App
from flynn.types.artifact import SQUASHFS_TYPE, Artifact, Entrypoint, ImageManifest, Layer, Rootfs
from flynn.types.job import NewJob
from flynn.types.release import Port, ProcessType, Release


def image(*layers: str, **entrypoints: Entrypoint) -> Artifact:
    rootfs = Rootfs(layers=[Layer(id=layer, type=SQUASHFS_TYPE, length=1) for layer in layers])
    manifest = ImageManifest(entrypoints=entrypoints, rootfs=[rootfs])
    return Artifact(type="flynn", manifest=manifest.document(), layer_url_template="https://b/{id}.squashfs")


BASE = image("l1", "l2", _default=Entrypoint(args=["/base"], env={"A": "image", "B": "image"}, cwd="/app", uid=7))
SLUG = image("l3")
APP = App(id="a1", name="shop", meta={"flynn-system-app": "true", "k": "v"})
RELEASE = Release(
    id="r1",
    env={"B": "release", "C": "release"},
    processes={"web": ProcessType(args=["run"], env={"C": "process"}, service="shop-web", ports=[Port(port=8080)])},
)


def test_the_topmost_entrypoint_of_the_right_name_wins() -> None:
    top = image("l3", web=Entrypoint(args=["/web"]))
    assert entrypoint([BASE, top], "web").args == ["/web"]
    assert entrypoint([BASE, top], "worker").args == ["/base"]
    assert entrypoint([SLUG], "web").args == []


def test_layers_stack_in_order() -> None:
    assert [(m.id, m.url) for m in mountspecs([BASE, SLUG])] == [
        ("l1", "https://b/l1.squashfs"), ("l2", "https://b/l2.squashfs"), ("l3", "https://b/l3.squashfs"),
    ]  # fmt: skip


def test_a_job_of_a_formation() -> None:
    job = formation_job(APP, RELEASE, [BASE, SLUG], "web", host_id="n1", uuid="u1")
    assert job.id == "n1-u1"
    assert job.partition == "system"
    assert job.metadata == {
        "flynn-system-app": "true", "k": "v", "flynn-controller.app": "a1", "flynn-controller.app_name": "shop",
        "flynn-controller.release": "r1", "flynn-controller.type": "web", "flynn-controller.formation": "true",
        "flynn-controller.service": "shop-web",
    }  # fmt: skip
    assert job.config.args == ["run"]
    assert job.config.env == {
        "A": "image", "B": "release", "C": "process", "FLYNN_APP_ID": "a1", "FLYNN_APP_NAME": "shop",
        "FLYNN_RELEASE_ID": "r1", "FLYNN_PROCESS_TYPE": "web", "FLYNN_JOB_ID": "n1-u1",
    }  # fmt: skip
    assert (job.config.working_dir, job.config.uid) == ("/app", 7)


def test_a_one_off_job_cannot_pretend_to_belong_to_another_app() -> None:
    wanted = NewJob(meta={"flynn-controller.app": "evil", "flynn-system-app": "true", "note": "x"}, args=["ls"])
    user_app = App(id="a2", name="mine")
    job = one_off_job(user_app, RELEASE, [BASE], wanted, host_id="n1", uuid="u1", attached=True)
    assert job.metadata["flynn-controller.app"] == "a2"
    assert job.metadata["note"] == "x"
    assert "flynn-system-app" not in job.metadata
    assert "flynn-controller.formation" not in job.metadata
    assert job.config.stdin


def test_release_env_is_given_to_one_off_jobs_only_on_request() -> None:
    for wanted, expected in ((NewJob(), "image"), (NewJob(release_env=True), "release")):
        job = one_off_job(APP, RELEASE, [BASE], wanted, host_id="n1", uuid="u1", attached=False)
        assert job.config.env["B"] == expected


def test_old_spellings_are_translated() -> None:
    assert with_legacy_defaults(ProcessType(entrypoint=["/e"], cmd=["c"], args=["x"])).args == ["/e", "c"]
    assert with_legacy_defaults(ProcessType(args=["x"], cmd=["c"])).args == ["x", "c"]
    assert with_legacy_defaults(ProcessType()).resources["memory"].limit == 1 << 30


def test_job_ids() -> None:
    assert split_job_id("host1-aa-bb") == ("host1", "aa-bb")
    assert split_job_id("nodash") is None
    assert split_job_id("-x") is None
