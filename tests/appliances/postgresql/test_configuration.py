"""The server's files as texts."""

from pathlib import Path

from flynn.appliances.postgresql.configuration import ServerSettings, pg_hba_conf, postgresql_conf


def values(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines())


def test_a_server_with_tls() -> None:
    settings = ServerSettings(port=5432, socket_directory=Path("/run/x"), certificate=Path("/c"), key=Path("/k"))
    conf = values(postgresql_conf(settings))
    assert conf["port"] == "5432"
    assert conf["unix_socket_directories"] == "'/run/x'"
    assert (conf["ssl"], conf["ssl_cert_file"], conf["ssl_key_file"]) == ("'on'", "'/c'", "'/k'")
    assert (conf["fsync"], conf["synchronous_commit"]) == ("'on'", "'on'")
    assert "default_transaction_read_only" not in conf
    assert "session_preload_libraries" not in conf


def test_read_only_mode_and_the_extension_whitelist_are_settings() -> None:
    settings = ServerSettings(port=1, socket_directory=Path("/r"), read_only=True, extension_whitelist=True)
    conf = values(postgresql_conf(settings))
    assert conf["default_transaction_read_only"] == "'on'"
    assert conf["session_preload_libraries"] == "'pgextwlist'"
    assert "hstore" in conf["extwlist.extensions"].split(",")
    assert "ssl" not in conf


def test_quotes_in_values_are_doubled() -> None:
    assert "unix_socket_directories = '/it''s'\n" in postgresql_conf(
        ServerSettings(port=1, socket_directory=Path("/it's"))
    )


def test_the_superuser_comes_from_elsewhere_only_over_tls_and_nobody_is_trusted_but_the_private_socket() -> None:
    rules = [line.split() for line in pg_hba_conf().splitlines() if not line.startswith("#")]
    assert [rule for rule in rules if rule[-1] == "trust"] == [["local", "all", "all", "trust"]]
    remote = [rule for rule in rules if rule[0] != "local" and rule[2] in ("flynn", "all") and rule[1] == "all"]
    assert remote == [
        ["hostssl", "all", "flynn", "all", "scram-sha-256"],
        ["hostnossl", "all", "flynn", "all", "reject"],
        ["host", "all", "all", "all", "scram-sha-256"],
    ]
