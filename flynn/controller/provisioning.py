"""Asking a provider to make or remove a resource. spec/controller section 7.8."""

from __future__ import annotations

from urllib.parse import quote

from flynn.controller.neighbours import Neighbours
from flynn.types.errors import ApiError, NotFound, ServiceUnavailable, Unreachable, ValidationError
from flynn.types.provider import Provider, Provisioned, Resource


class Provisioner:
    """The providers behind their URLs."""

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours

    async def provision(self, provider: Provider, config: object) -> Provisioned:
        """Have a resource made.

        Raises:
            ApiError: the provider refused or did not answer; never said to be worth a retry, for it may have acted.
        """
        try:
            async with self._neighbours.at(provider.url) as (client, path):
                return await client.post(path, {} if config is None else config, answer=Provisioned)
        except ApiError as error:
            raise _failed(provider, "provision a resource", error) from error

    async def deprovision(self, provider: Provider, resource: Resource) -> None:
        """Have a resource removed with its data; one the provider does not know (any more) counts as removed."""
        try:
            async with self._neighbours.at(provider.url) as (client, path):
                separator = "&" if "?" in path else "?"
                await client.delete(f"{path}{separator}id={quote(resource.external_id, safe='')}")
        except NotFound:
            return
        except ApiError as error:
            raise _failed(provider, f"remove {resource.external_id}", error) from error


def _failed(provider: Provider, what: str, error: ApiError) -> ApiError:
    text = f"provider {provider.name} could not {what}: {error.message}"
    if isinstance(error, ValidationError):
        return ValidationError("", text)
    if isinstance(error, Unreachable):
        return ServiceUnavailable(text, retry=False)
    return ApiError(text)
