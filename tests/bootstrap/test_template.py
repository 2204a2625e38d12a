"""The template forms that manifests use."""

import pytest
from pytest import param

from flynn.bootstrap.template import Scope, TemplateError, member_ips, render, render_environment

SCOPE = Scope(
    step_data={"pw": {"data": "s3cret"}, "cert": {"ca_cert": "CA", "pin": "PIN"}, "image": {"id": "i1"}},
    environment={"CLUSTER_DOMAIN": "example.com"},
    host_ips=["10.0.0.2", "10.0.0.10"],
    singleton=True,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        param("plain", "plain", id="text stays"),
        param('controller.{{ getenv "CLUSTER_DOMAIN" }}', "controller.example.com", id="environment"),
        param('{{ getenv "UNSET" }}', "", id="an unset variable is empty"),
        param('{{ (index .StepData "pw").Data }}', "s3cret", id="what a step left"),
        param('{{ (index .StepData "cert").CACert }}', "CA", id="names are Go's"),
        param('{{ (index .StepData "image").ID }}', "i1", id="id of an artifact"),
        param("{{ .Singleton }}", "true", id="singleton"),
        param('{{ md5sum (getenv "UNSET") }}', "d41d8cd98f00b204e9800998ecf8427e", id="md5sum"),
        param(
            "{{ range $ip := .SortedHostIPs }}{{ $ip }}:1111,{{ end }}",
            "10.0.0.10:1111,10.0.0.2:1111,",
            id="addresses are sorted as strings and keep the last comma",
        ),
    ],
)
def test_the_forms(text: str, expected: str) -> None:
    assert render(text, SCOPE) == expected


@pytest.mark.parametrize(
    "text", ['{{ (index .StepData "later").Data }}', "{{ exec }}", '{{ (index .StepData "pw").Pin }}']
)
def test_what_is_not_there_is_an_error(text: str) -> None:
    with pytest.raises(TemplateError):
        render(text, SCOPE)


def test_empty_variables_are_dropped() -> None:
    assert render_environment({"A": '{{ getenv "UNSET" }}', "B": "x"}, SCOPE) == {"B": "x"}


@pytest.mark.parametrize(("hosts", "members"), [(1, 1), (3, 3), (4, 3), (5, 5), (6, 5), (9, 5)])
def test_an_odd_number_of_hosts_keeps_the_directory(hosts: int, members: int) -> None:
    ips = [f"10.0.0.{number}" for number in range(1, hosts + 1)]
    assert member_ips(ips[::-1]) == ips[:members]


def test_the_addresses_of_members_alone() -> None:
    assert render("{{ range $ip := .MemberIPs }}{{ $ip }},{{ end }}", SCOPE) == "10.0.0.10,"
