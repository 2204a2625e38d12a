"""How another machine becomes a host of this cluster: join tokens, which carry trust both ways.

A token is what the operator carries from one machine to the other. It holds the pin of the cluster's authority, by
which the newcomer knows the cluster, addresses to ask, and a secret, by which the cluster knows the newcomer:

    flynn1.<base64url of {"pin", "addresses", "secret"}>

The newcomer first fetches the authority's certificate without trusting anybody, compares it with the pin, and sends
the secret only through a connection that this authority vouches for. The answer is the authority itself, key included,
because every host issues the certificates of its own jobs. So a token is worth a host: it ends with its time or uses.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Address

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from flynn.aio.clock import Clock
from flynn.host import state
from flynn.host.state import KeptToken, StateStore
from flynn.types.codec import Wire, always, decode, encode, replace
from flynn.types.errors import ApiError, Forbidden, ObjectExists, RateLimited, ValidationError

log = logging.getLogger(__name__)

PREFIX = "flynn1."
MAX_LIFETIME = timedelta(days=7)
MAX_USES = 1000
REMEMBERED = timedelta(days=1)  # how long a token that has ended is still listed in the state

FAILURES = 5  # wrong secrets that one address may send ...
FAILURES_WITHIN = 60.0  # ... in so many seconds
ADDRESSES_WATCHED = 1000


class JoinToken(Wire):
    """What the operator carries."""

    pin: str  # hex SHA-256 of the authority's certificate (DER)
    addresses: list[str] = always([])  # `ip:port` of hosts that answer
    secret: str = always("")

    def __str__(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(encode(self)).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises ValidationError for anything but a token of ours."""
        text = text.strip()
        try:
            if not text.startswith(PREFIX):
                raise ValueError(f"a token begins with {PREFIX}")
            raw = text.removeprefix(PREFIX)
            token = decode(base64.b64decode(raw + "=" * (-len(raw) % 4), b"-_", validate=True), cls)
            if len(bytes.fromhex(token.pin)) != hashlib.sha256().digest_size:
                raise ValueError("its pin is damaged")
        except (ValueError, ApiError) as error:
            raise ValidationError("token", f"cannot be read: {error}") from error
        if not token.addresses or not token.secret:
            raise ValidationError("token", "is incomplete")
        return token


class TokenRequest(Wire):
    """`POST /host/tokens`."""

    ttl: int = 3600  # seconds
    uses: int = 1


class TokenCreated(Wire):
    token: str
    expires_at: datetime
    uses: int


class Authority(Wire):
    """`GET /host/ca`: public, and of use only to those who can compare it with a pin."""

    ca: str  # PEM


class JoinRequest(Wire):
    """`POST /host/join`."""

    secret: str = always("")
    id: str = always("")
    address: str = always("")


class Welcome(Wire):
    """What makes a machine a host."""

    ca: str
    ca_key: str
    peers: list[str] = always([])  # addresses of hosts, where the directory can be asked


def pin_of(ca_pem: bytes) -> str:
    return hashlib.sha256(x509.load_pem_x509_certificate(ca_pem).public_bytes(Encoding.DER)).hexdigest()


def check_newcomer(request: JoinRequest, known: Mapping[str, str]) -> None:
    """Refuse ids and addresses that cannot be, or that another host (`known`: address by id) answers to."""
    if not request.id or "-" in request.id or "/" in request.id or len(request.id) > 64:
        raise ValidationError("id", f"has no dashes or slashes, got {request.id!r}")
    try:
        IPv4Address(request.address)
    except ValueError:
        raise ValidationError("address", f"must be an IPv4 address, not {request.address!r}") from None
    for host_id, address in known.items():
        if (host_id == request.id) != (address == request.address):
            raise ObjectExists(f"there is a host {host_id} at {address} already")


class FailureLimit:
    """Slows down those who guess, one address at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises RateLimited for an address that has been wrong too often of late."""
        recent = self._failures.get(address)
        while recent and recent[0] <= self._clock.monotonic() - FAILURES_WITHIN:
            recent.popleft()
        if recent and len(recent) >= FAILURES:
            raise RateLimited("too many wrong tokens from this address, try again in a minute")

    def failed(self, address: str) -> None:
        self._failures.setdefault(address, deque()).append(self._clock.monotonic())
        self._failures.move_to_end(address)
        while len(self._failures) > ADDRESSES_WATCHED:
            self._failures.popitem(last=False)


class JoinTokens:
    """The tokens this host has given out. They are used up on this host, and survive its restarts."""

    def __init__(self, store: StateStore, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._tokens = {token.id: token for token in store.join_tokens()}

    async def create(self, request: TokenRequest) -> tuple[str, KeptToken]:
        """A new secret, and what is kept of it. Raises ValidationError."""
        if not 0 < request.ttl <= MAX_LIFETIME.total_seconds():
            raise ValidationError("ttl", f"must be between 1 second and {MAX_LIFETIME.days} days")
        if not 0 < request.uses <= MAX_USES:
            raise ValidationError("uses", f"must be between 1 and {MAX_USES}")
        lifetime = timedelta(seconds=request.ttl)
        await self._forget_old()
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        token = KeptToken(
            id=name, digest=_digest(secret), expires_at=self._clock.now() + lifetime, uses=request.uses
        )  # fmt: skip
        await self._store.commit(state.save_join_token(token), durable=True)
        self._tokens[name] = token
        return f"{name}.{secret}", token

    def verify(self, secret: str) -> KeptToken:
        """The token that is still good for a use. Raises Forbidden, always with the same words."""
        name, _, rest = secret.partition(".")
        token = self._tokens.get(name)
        # An unknown token takes as long as a wrong one.
        fits = hmac.compare_digest(_digest(rest), token.digest if token is not None else _digest(""))
        if token is None or not fits or token.uses < 1 or token.expires_at <= self._clock.now():
            raise Forbidden("this token is not valid (any more)")
        return token

    async def use(self, token: KeptToken) -> None:
        """Take one use of a token that was just verified; on disk before this returns."""
        left = replace(token, uses=token.uses - 1)
        self._tokens[token.id] = left  # before the first await: two callers do not share one use
        await self._store.commit(state.save_join_token(left), durable=True)

    async def _forget_old(self) -> None:
        limit = self._clock.now() - REMEMBERED
        old = [name for name, token in self._tokens.items() if token.expires_at < limit]
        for name in old:
            del self._tokens[name]
        await self._store.commit(*(state.forget_join_token(name) for name in old))


class Joining:
    """What a host can say about joining its cluster."""

    def __init__(
        self, tokens: JoinTokens, clock: Clock, *, ca: bytes, ca_key: bytes, own_address: str, http_port: int
    ) -> None:
        self._tokens, self._limit = tokens, FailureLimit(clock)
        self._ca, self._ca_key = ca, ca_key
        self._own_address, self._http_port = own_address, http_port
        self.authority = Authority(ca=ca.decode())

    async def invite(self, request: TokenRequest) -> TokenCreated:
        secret, kept = await self._tokens.create(request)
        # This host alone: the others do not know the secret.
        token = JoinToken(pin=pin_of(self._ca), addresses=[f"{self._own_address}:{self._http_port}"], secret=secret)
        log.info("join token made", extra={"token": kept.id, "uses": kept.uses, "expires": kept.expires_at.isoformat()})
        return TokenCreated(token=str(token), expires_at=kept.expires_at, uses=kept.uses)

    async def welcome(self, request: JoinRequest, caller: str, hosts: Mapping[str, str]) -> Welcome:
        """Make the caller a host; `hosts` are those that are known (address by id)."""
        self._limit.check(caller)
        try:
            token = self._tokens.verify(request.secret)
        except Forbidden as refusal:
            self._limit.failed(caller)
            log.warning("join refused", extra={"caller": caller, "id": request.id, "reason": str(refusal)})
            raise
        check_newcomer(request, hosts)
        await self._tokens.use(token)
        log.info("host joins", extra={"id": request.id, "address": request.address})
        peers: Sequence[str] = [self._own_address, *(a for a in sorted(hosts.values()) if a != self._own_address)]
        return Welcome(
            ca=self._ca.decode(), ca_key=self._ca_key.decode(), peers=[a for a in peers if a != request.address]
        )  # fmt: skip


def _digest(secret: str) -> str:
    """Of 256 random bits, so a plain hash is as good as a slow one."""
    return hashlib.sha256(secret.encode()).hexdigest()
