"""The sticky cookie, against what NaCl itself produces."""

from __future__ import annotations

import base64

import pytest

from flynn.router.sticky import address_in, cookie_value, seal, unseal

# The vector of NaCl's own tests/secretbox.c.
KEY = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
NONCE = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
MESSAGE = bytes.fromhex(
    "be075fc53c81f2d5cf141316ebeb0c7b5228c52a4c62cbd44b66849b64244ffce5ecbaaf33bd751a"
    "1ac728d45e6c61296cdc3c01233561f41db66cce314adb310e3be8250c46f06dceea3a7fa1348057"
    "e2f6556ad6b1318a024a838f21af1fde048977eb48f59ffd4924ca1c60902e52f0a089bc76897040"
    "e082f937763848645e0705"
)
SEALED = bytes.fromhex(
    "f3ffc7703f9400e52a7dfb4b3d3305d98e993b9f48681273c29650ba32fc76ce48332ea7164d96a4"
    "476fb8c531a1186ac0dfc17c98dce87b4da7f011ec48c97271d2c20f9b928fe2270d6fb863d51738"
    "b48eeee314a7cc8ab932164548e526ae90224368517acfeabd6bb3732bc0e9da99832b61ca01b6de"
    "56244a9e88d5f9b37973f622a43d14a6599b1f654cb45a74e355a5"
)


def test_the_box_is_the_one_of_nacl() -> None:
    assert seal(KEY, NONCE, MESSAGE) == SEALED
    assert unseal(KEY, NONCE, SEALED) == MESSAGE


def test_a_changed_box_is_refused() -> None:
    assert unseal(KEY, NONCE, SEALED[:-1] + b"x") is None
    assert unseal(bytes(32), NONCE, SEALED) is None


def test_one_backend_has_one_cookie() -> None:
    cookie = cookie_value(KEY, "100.64.3.9:8080")
    assert cookie == cookie_value(KEY, "100.64.3.9:8080")
    assert cookie != cookie_value(KEY, "100.64.3.9:8081")
    assert address_in(KEY, cookie) == "100.64.3.9:8080"


def test_cookies_of_an_original_router_are_readable() -> None:
    """The same format with a nonce it drew at random."""
    nonce = bytes(range(24))
    cookie = base64.b64encode(nonce + seal(KEY, nonce, b"10.0.0.7:80")).decode()
    assert address_in(KEY, cookie) == "10.0.0.7:80"


@pytest.mark.parametrize("cookie", ["", "nonsense", "!!!", base64.b64encode(bytes(60)).decode()])
def test_nonsense_is_no_address(cookie: str) -> None:
    assert address_in(KEY, cookie) is None
