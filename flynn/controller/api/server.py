"""The whole API, put together from its resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flynn.controller.api.apps import AppsApi
from flynn.controller.api.deployments import DeploymentsApi
from flynn.controller.api.events import EventsApi
from flynn.controller.api.formations import FormationsApi
from flynn.controller.api.jobs import JobsApi
from flynn.controller.api.keys import CA_CERT_PATH, cors_headers, key_check
from flynn.controller.api.logs import LogsApi
from flynn.controller.api.parameters import INSIDERS_WITH_KEY
from flynn.controller.api.releases import ReleasesApi
from flynn.controller.api.resources import ResourcesApi
from flynn.controller.api.routes import RoutesApi
from flynn.controller.api.volumes import SinksApi, VolumesApi
from flynn.controller.hosts import Hosts
from flynn.controller.manifests import ManifestSource
from flynn.controller.neighbours import Neighbours
from flynn.controller.provisioning import Provisioner
from flynn.controller.stores import Stores
from flynn.http.server import Api, Raw, Request, shutting_down
from flynn.logaggregator.client import LogAggregator
from flynn.types.codec import encode
from flynn.types.errors import ApiError
from flynn.types.status import Health, Status
from flynn.version import VERSION

EVERYTHING_ELSE = "/{path:.*}"
MAX_BODY_BYTES = 8 * 1024 * 1024  # a release with a very long environment is still below one


@dataclass(slots=True)
class Door:
    """Whether requests are still let in; closed first on the way out."""

    open: bool = True
    reason: ApiError = field(default_factory=lambda: shutting_down("controller"))


def controller_api(
    stores: Stores,
    *,
    keys: Sequence[str],
    ca_cert: str,
    domain: str,
    hosts: Hosts,
    neighbours: Neighbours,
    aggregator: LogAggregator,
    door: Door,
) -> Api:
    """Return the API over the given stores and neighbours."""

    async def status() -> Status:
        await stores.database.ping()
        return Status(status=Health.HEALTHY, version=VERSION)

    def before(request: Request) -> Raw | None:
        if request.method == "OPTIONS" and request.header("Origin"):
            return Raw()
        if not door.open:
            refusal = {"code": door.reason.code, "message": door.reason.message, "retry": True}
            return Raw(encode(refusal), "application/json", door.reason.status)
        return None

    async def serve_ca_cert(request: Request) -> Raw:
        return Raw(ca_cert, "application/x-x509-ca-cert")

    async def unknown(request: Request) -> Raw:
        # An endpoint like any other, so that who has no key gets 401 here too and learns nothing about what there is.
        return Raw("404 page not found\n", "text/plain; charset=utf-8", 404)

    api = Api(
        "controller",
        status=status,
        status_access=INSIDERS_WITH_KEY,
        max_body_bytes=MAX_BODY_BYTES,
        authorize=key_check(keys),
        bare=frozenset({401, 404}),
        before=before,
        headers=cors_headers(domain),
    )
    api.route("GET", CA_CERT_PATH, serve_ca_cert, allow=INSIDERS_WITH_KEY)
    for resource in (
        AppsApi(stores),
        ReleasesApi(stores, ManifestSource(neighbours)),
        FormationsApi(stores),
        JobsApi(stores, hosts),
        DeploymentsApi(stores),
        EventsApi(stores),
        ResourcesApi(stores, Provisioner(neighbours)),
        RoutesApi(stores),
        VolumesApi(stores),
        SinksApi(stores),
        LogsApi(stores, aggregator),
    ):
        resource.mount(api)
    api.route("*", EVERYTHING_ELSE, unknown, allow=INSIDERS_WITH_KEY)
    return api
