"""`token create` on a host of the cluster, `join` on the machine that is to become one."""

from __future__ import annotations

import os
import re
import ssl
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flynn.host.cli.access import SERVER_NAME, admin_key, runs
from flynn.host.config import CONFIG_DIR, HTTP_PORT, STATE_DIR, default_id, default_ip
from flynn.http.client import HttpClient, KeyAuth
from flynn.types.errors import Unreachable

if TYPE_CHECKING:
    from flynn.host.joining import JoinRequest, JoinToken, Welcome

JOIN_SECONDS = 10.0
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Lifetime(click.ParamType):  # type: ignore[type-arg]  # generic only for the type checker
    """`90s`, `30m`, `1h`, `7d`."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d+)([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration like 30m, 1h or 7d", param, ctx)
        return timedelta(**{UNITS[match[2]]: int(match[1])})


@click.group()
def token() -> None:
    """Invite machines into the cluster."""


@token.command("create")
@click.option("--ttl", type=Lifetime(), default="1h", show_default=True, help="How long it is valid.")
@click.option("--uses", default=1, show_default=True, help="How many machines may join with it.")
@runs
async def create(ttl: timedelta, uses: int) -> None:
    """Print a token for `flynn-host join`. Whoever has it can become a host, so treat it as a password."""
    from flynn.host.joining import TokenCreated, TokenRequest

    async with HttpClient(
        f"http://127.0.0.1:{os.environ.get('FLYNN_HOST_PORT', HTTP_PORT)}", auth=KeyAuth(admin_key())
    ) as http:
        wanted = TokenRequest(ttl=int(ttl.total_seconds()), uses=uses)
        made = await http.post("/host/tokens", wanted, answer=TokenCreated)
    click.echo(f"valid until {made.expires_at:%Y-%m-%d %H:%M:%S} UTC, for {uses} host(s)", err=True)
    click.echo(made.token)


@click.command()
@click.argument("token")
@click.option("--id", "host_id", default="", help="Host id, without dashes. Default: the host name.")
@click.option("--external-ip", default="", help="Address this host is reached at. Default: of the default route.")
@click.option("--state-dir", default=str(STATE_DIR), envvar="FLYNN_STATE_DIR", show_default=True)
@click.option("--config-dir", default=str(CONFIG_DIR), envvar="FLYNN_CONFIG_DIR", show_default=True)
@runs
async def join(token: str, host_id: str, external_ip: str, state_dir: str, config_dir: str) -> None:
    """Make this machine a host of the cluster that TOKEN is from. Start `flynn-host daemon` afterwards."""
    from flynn.host.enrolment import adopt_authority, enrol
    from flynn.host.joining import JoinRequest, JoinToken

    host_id = host_id or default_id()
    address = external_ip or default_ip()
    welcome = await ask(JoinToken.parse(token), JoinRequest(id=host_id, address=address))
    adopt_authority(Path(state_dir), welcome.ca.encode(), welcome.ca_key.encode())
    args = ["--id", host_id]
    if external_ip:
        args += ["--external-ip", external_ip]
    args += ["--peer-ips", ",".join(welcome.peers)]
    enrol(state_dir=Path(state_dir), config_dir=Path(config_dir), host_id=host_id, external_ip=address, args=args)
    click.echo(f"host {host_id} has joined: {config_dir}")


async def ask(token: JoinToken, request: JoinRequest) -> Welcome:
    """Fetch what a host needs from the first address of the token that answers.

    Raises:
        Forbidden: the token is expired, used up, or another cluster's.
        ClickException: nobody answers, or whoever does is not the cluster of the token.
    """
    from flynn.host.joining import Welcome
    from flynn.types.codec import replace

    failures = []
    for address in token.addresses:
        try:
            context = await _trusting(token, address)
            async with HttpClient(
                f"https://{address}", tls=context, server_name=SERVER_NAME, timeout=JOIN_SECONDS
            ) as http:
                return await http.post("/host/join", replace(request, secret=token.secret), answer=Welcome)
        except Unreachable as error:
            failures.append(f"{address}: {error}")
    raise click.ClickException("no host answers: " + "; ".join(failures))


async def _trusting(token: JoinToken, address: str) -> ssl.SSLContext:
    """Trust in the authority that the token pins, whose certificate is fetched from a stranger."""
    from flynn.host.joining import Authority, pin_of

    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    async with HttpClient(f"https://{address}", tls=blind, timeout=JOIN_SECONDS) as http:
        ca = (await http.get("/host/ca", answer=Authority)).ca
    try:
        fits = pin_of(ca.encode()) == token.pin
    except ValueError:
        fits = False
    if not fits:
        raise click.ClickException(f"{address} is not of the cluster that the token is from")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    return context
