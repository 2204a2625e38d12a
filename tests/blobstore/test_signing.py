"""A signed URL allows one verb on one blob until its time is over, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from flynn.blobstore.signing import BadSignature, signed_url, verify

NOW = datetime(2026, 1, 1, tzinfo=UTC)
URL = signed_url(
    "https://blobstore.discoverd:80", "PUT", "/slugs/a b.json", key="secret", expires=NOW + timedelta(hours=1)
)


def attempt(
    method: str = "PUT", path: str = "/slugs/a b.json", key: str = "secret", later: int = 0, **changed: str
) -> None:
    query = {name: values[0] for name, values in parse_qs(urlsplit(URL).query).items()} | changed
    verify(key, method, path, expires=query["expires"], given=query["signature"], now=NOW + timedelta(minutes=later))


def test_what_was_signed_is_allowed() -> None:
    assert unquote(urlsplit(URL).path) == "/slugs/a b.json"
    attempt()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"method": "GET"}, "does not fit", id="another verb"),
        pytest.param({"path": "/slugs/b.json"}, "does not fit", id="another blob"),
        pytest.param({"key": "other"}, "does not fit", id="another key"),
        pytest.param({"key": ""}, "not accepted", id="a store without a key"),
        pytest.param({"later": 60}, "expired", id="too late"),
        pytest.param({"expires": "99999999999"}, "does not fit", id="a later expiry"),
        pytest.param({"expires": "1e9"}, "not a number", id="an expiry that is no number"),
        pytest.param({"expires": "\u0661"}, "not a number", id="a digit of another script"),
        pytest.param({"signature": "\u00e9"}, "does not fit", id="a signature that is not ASCII"),
    ],
)
def test_anything_else_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(BadSignature, match=why):
        attempt(**change)  # type: ignore[arg-type]  # a table of keyword arguments


def test_a_url_signed_for_get_also_allows_head() -> None:
    url = signed_url("http://b", "GET", "/x", key="k", expires=NOW + timedelta(hours=1))
    query = parse_qs(urlsplit(url).query)
    verify("k", "HEAD", "/x", expires=query["expires"][0], given=query["signature"][0], now=NOW)
