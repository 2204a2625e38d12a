"""Go templates over jobs, as scripts and log sinks have them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flynn.host.template import Template, TemplateError
from flynn.types.host import ActiveJob, ContainerConfig, HostJob, JobStatus, VolumeBinding

JOB = HostJob(
    id="node1-x",
    metadata={"flynn-controller.app_name": "shop", "b": "2", "a": "1"},
    config=ContainerConfig(
        args=["web", "-v"], env={"PORT": "80"}, volumes=[VolumeBinding(target="/data", volume="v")], host_network=True
    ),
)
ACTIVE = ActiveJob(
    job=JOB, host_id="node1", status=JobStatus.RUNNING, pid=7, created_at=datetime(2026, 1, 5, 10, 0, 0, 500000, UTC)
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("{{.Job.ID}}", "node1-x"),
        ('{{.Job.ID}} {{metadata "flynn-controller.app_name"}}', "node1-x shop"),
        ("{{ .HostID }}:{{.Status}}:{{.PID}}:{{.ExitStatus}}", "node1:running:7:<nil>"),
        ("{{.CreatedAt}}", "2026-01-05 10:00:00.5 +0000 UTC"),
        ('{{index .Job.Metadata "a"}}{{index .Job.Metadata "none"}}|', "1|"),
        ("{{.Job.Config.Env.PORT}}{{.Job.Config.Env.NONE}}", "80"),
        ("{{.Job.Config.Args}} {{index .Job.Config.Args 1}} {{len .Job.Config.Args}}", "[web -v] -v 2"),
        ("{{.Job.Config.HostNetwork}} {{.Job.Config.TTY}}", "true false"),
        ("{{range .Job.Config.Args}}<{{.}}>{{end}}", "<web><-v>"),
        (
            '{{range $k, $v := .Job.Metadata}}{{if ne $k "a"}}{{$k}}={{$v}} {{end}}{{end}}',
            "b=2 flynn-controller.app_name=shop ",
        ),
        ("{{range .Job.Profiles}}x{{else}}none{{end}}", "none"),
        ("{{range .Job.Config.Volumes}}{{.VolumeID}} on {{.Target}}{{end}}", "v on /data"),
        ('{{if eq .Status "running" "starting"}}up{{else}}down{{end}}', "up"),
        ("{{if .Error}}bad{{else if .PID}}pid{{else}}none{{end}}!", "pid!"),
        ('{{with index .Job.Metadata "b"}}[{{.}}]{{end}}{{with .Error}}x{{end}}', "[2]"),
        ('{{printf "%s-%d %q" .HostID .PID "a\\"b"}}', 'node1-7 "a\\"b"'),
        ('{{.HostID | printf "%s/%s" "x"}}', "x/node1"),
        ("{{and .PID .Error}}{{or .Error .PID}} {{not .Error}}", "<nil>7 true"),
        ("a  {{- /* nothing */ -}}  b", "ab"),
        ("a {{- .PID -}} b", "a7b"),
        ("{{$x := .PID}}{{$x}} {{$.HostID}} {{(index .Job.Config.Args 0)}}", "7 node1 web"),
        ("{{json .Job.Config.Args}}", '["web","-v"]'),
        ("{{`raw \\n`}}", "raw \\n"),
    ],
)
def test_templates(template: str, text: str) -> None:
    functions = {"metadata": lambda key: JOB.metadata.get(key, "")}
    assert Template(template, ("metadata",)).render(ACTIVE, functions) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{.Nope}}", "can't evaluate field Nope"),
        ("{{nope .}}", 'function "nope" not defined'),
        ("{{if .PID}}", "unexpected end"),
        ("{{end}}", "unexpected {{end}}"),
        ("{{.PID", "unexpected end"),
        ("{{}}", "missing value"),
        ("{{.PID |}}", "nothing behind"),
        ("{{index .Job.Config.Args 9}}", "can't index"),
        ("{{len .PID}}", "error calling len"),
        ("{{$y}}", "undefined variable"),
        ("{{(.PID}}", "unclosed"),
        ("{{.PID 3}}", "can't give argument"),
    ],
)
def test_what_is_no_template_or_does_not_fit_is_said(template: str, error: str) -> None:
    with pytest.raises(TemplateError, match=error):
        Template(template).render(ACTIVE)


@given(st.text(alphabet=' .{}-|$:="()/*abIDJob0', max_size=40))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        Template(text).render(ACTIVE)
    except TemplateError:
        pass


def test_a_template_cannot_fill_the_memory() -> None:
    text = "{{range $.Job.Metadata}}" * 12 + "x" * 1000 + "{{end}}" * 12
    with pytest.raises(TemplateError):
        Template(text).render(ACTIVE)
