"""What of the build machine's settings is carried into a build."""

from flynn.images.machine import (
    NOWHERE,
    Machine,
    debian_sources,
    fetch_options,
    for_suite,
    index_settings,
    npm_environment_settings,
    npmrc_settings,
    pip_settings,
)

ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] http://mirror.example/debian bookworm main contrib # ours
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/cloud cloud-sdk main
"""
DEB822 = """\
Types: deb deb-src
URIs: http://mirror.example/debian
# a comment
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://mirror.example/off
Suites: bookworm
Components: main
"""


def test_sources_of_both_formats_become_one_list() -> None:
    assert debian_sources([ONE_LINE], [DEB822]) == (
        "deb http://mirror.example/debian bookworm main contrib",
        "deb http://mirror.example/cloud cloud-sdk main",
        "deb http://mirror.example/debian bookworm-updates main contrib",
        "deb http://mirror.example/debian-security bookworm-security main",
    )


def test_only_the_release_s_own_suites_are_used() -> None:
    found = for_suite(debian_sources([ONE_LINE], [DEB822]), "bookworm")
    assert [line.split()[2] for line in found] == ["bookworm", "bookworm-updates", "bookworm-security"]
    assert for_suite(found, "trixie") == ()


def test_of_apt_s_options_only_those_about_fetching_are_carried() -> None:
    dump = """\
APT::Architecture "amd64";
Acquire "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::Check-Valid-Until "false";
Acquire::https::CaInfo "/etc/ssl/corp.pem";
Acquire::IndexTargets::deb::Packages::MetaKey "x";
Acquire::cdrom::mount "/media/cdrom/";
"""
    assert fetch_options(dump) == (
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Check-Valid-Until "false";',
    )


def test_pip_s_files_and_variables_are_merged_and_local_paths_dropped() -> None:
    files = [
        "[global]\nindex-url = http://a.example/simple\nextra-index-url = file:///opt/x http://b.example/simple\n",
        "[global]\nfind-links = /opt/wheels\n[install]\ntrusted-host = a.example\n",
    ]
    assert pip_settings(files, {"PIP_INDEX_URL": "http://c.example/simple", "PIP_CERT": "/x", "HOME": "/"}) == {
        "index-url": "http://c.example/simple",
        "extra-index-url": "http://b.example/simple",
        "trusted-host": "a.example",
    }


def test_npm_settings_leave_tokens_and_paths_behind() -> None:
    text = "registry=http://n.example/\n@corp:registry=http://c.example/\n"
    text += "//n.example/:_authToken=secret\ncafile=/x\n; no\n"
    environment = npm_environment_settings({"NPM_CONFIG_STRICT_SSL": "false", "npm_config_cache": "/tmp/x"})
    assert index_settings(["registry", "strict-ssl"], npmrc_settings(text), environment) == {
        "registry": "http://n.example/",
        "@corp:registry": "http://c.example/",
        "strict-ssl": "false",
    }


def test_files_and_variables_for_the_image() -> None:
    machine = Machine(
        apt_sources=(),
        apt_options=(),
        pip={"index-url": "http://p.example/simple"},
        npm={"registry": "http://n.example/"},
        proxies={"https_proxy": "http://proxy.example"},
        ca_bundle=b"PEM",
    )
    assert machine.pip_conf("/ca.crt") == "[global]\ncert = /ca.crt\nindex-url = http://p.example/simple\n"
    assert machine.npmrc("/ca.crt") == "cafile=/ca.crt\nregistry=http://n.example/\n"
    assert machine.pip_environment() == {"PIP_INDEX_URL": "http://p.example/simple"}
    env = machine.environment("/ca.crt")
    assert env["https_proxy"] == "http://proxy.example"
    assert env["NODE_EXTRA_CA_CERTS"] == env["PIP_CERT"] == "/ca.crt"


def test_a_machine_without_a_ca_bundle_leaves_every_tool_its_default() -> None:
    machine = Machine(apt_sources=(), apt_options=(), pip={}, npm={}, proxies={}, ca_bundle=b"")
    assert machine.environment("/ca.crt") == {}
    assert machine.pip_conf("/ca.crt") == "[global]\n"


def test_portable_images_carry_nothing_of_the_machine() -> None:
    assert NOWHERE.environment("/ca.pem") == {}
    assert NOWHERE.pip_conf("/ca.pem") == "[global]\n"
    assert NOWHERE.npmrc("/ca.pem") == ""
