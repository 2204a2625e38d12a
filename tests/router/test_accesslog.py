"""HAProxy's lines, as captured from a real one."""

from __future__ import annotations

import pytest

from flynn.router.accesslog import Line

HTTP = (
    "1795403552628 44 127.0.0.1:36680 http~ http:st:sticky 127.0.0.1:18082 423 -- +1 200"
    " 6368a0a3-af6b-425e-a03f-be9277a38d6c GET sticky.test /a?b"
)


def test_a_request() -> None:
    line = Line.parse(HTTP)
    assert line == Line(
        client="127.0.0.1:36680",
        frontend="http",
        service="st",
        addr="127.0.0.1:18082",
        status=200,
        duration_ms=44,
        bytes=423,
        termination="--",
        retries=1,
        request_id="6368a0a3-af6b-425e-a03f-be9277a38d6c",
        method="GET",
        host="sticky.test",
        path="/a?b",
    )


def test_a_tunnel_to_a_daemon() -> None:
    line = Line.parse("- 3006 127.0.0.1:52864 http raw:http:ctl 127.0.0.1:18081.tls 0 SC 3 - - - c -")
    assert line is not None
    assert (line.service, line.addr, line.host, line.status) == ("ctl", "127.0.0.1:18081", "c", 0)


def test_no_backend() -> None:
    line = Line.parse("1795403552562 0 127.0.0.1:5 http http:b-web <NOSRV> 145 SC 0 503 id GET a.test /2")
    assert line is not None
    assert (line.service, line.addr, line.status) == ("b-web", "", 503)


@pytest.mark.parametrize("text", ["", "Proxy http started.", "a b c d e f g h i j k l m n"])
def test_other_lines(text: str) -> None:
    assert Line.parse(text) is None
