"""HAProxy's statistics, as it writes them."""

from __future__ import annotations

from flynn.router.metrics import exposition
from flynn.router.stats import ServerStat, in_flight, parse

TEXT = """# pxname,svname,qcur,scur,stot,bout,econ,status,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,
http:shop-web,10.0.0.1:80,0,2,10,1000,1,no check,0,7,0,1,2,
http:shop-web:leader,10.0.0.1:80,0,1,4,50,0,MAINT,0,4,0,0,0,
raw:http:controller,10.0.0.9:80.tls,0,3,5,9,0,no check,,,,,,
identity,identity,0,0,0,0,0,MAINT,,,,,,
http:shop-web,BACKEND,0,2,10,1000,1,UP,0,7,0,1,2,

"""


def test_parse() -> None:
    stats = parse(TEXT)
    assert stats["http:shop-web", "10.0.0.1:80"] == ServerStat(2, False, 10, 1000, 1, (0, 7, 0, 1, 2))
    assert stats["http:shop-web:leader", "10.0.0.1:80"].maintenance
    assert len(stats) == 4


def test_what_is_in_flight_is_counted_over_all_pools_of_a_service() -> None:
    assert in_flight(parse(TEXT)) == {("shop-web", "10.0.0.1:80"): 3, ("controller", "10.0.0.9:80"): 3}


def test_metrics() -> None:
    lines = exposition(parse(TEXT)).splitlines()
    assert 'flynn_router_responses_total{service="shop-web",class="2xx"} 11' in lines
    assert 'flynn_router_in_flight{service="controller"} 3' in lines
    assert 'flynn_router_backends{service="shop-web"} 1' in lines
    assert 'flynn_router_backends{service="controller"} 1' in lines
    assert not any("identity" in line for line in lines)
