"""The refusals that cross the wire.

    ApiError
    ├── ValidationError       400 validation_error       a value is wrong; `detail.field` says which
    ├── BadSyntax             400 syntax_error           the body is not JSON
    ├── BodyTooBig            400 request_body_too_big
    ├── Unauthorized          401 unauthorized           no or wrong key
    ├── Forbidden             403 forbidden              a known peer that may not do this
    ├── NotFound              404 object_not_found
    ├── ObjectExists          409 object_exists
    ├── Conflict              409 conflict
    ├── PreconditionFailed    412 precondition_failed    compare-and-set lost
    ├── RateLimited           429 ratelimited            (retry)
    ├── UnknownError          500 unknown_error
    └── ServiceUnavailable    503 service_unavailable    (retry)

`Unreachable` is what a client raises when there was no answer at all. Servers raise these, clients raise the same
classes again: a caller never sees a status number or an HTTP library's exception.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class ApiError(Exception):
    """A refusal the caller can act on. `code` and `status` are wire contract and fixed per subclass."""

    code: ClassVar[str] = "unknown_error"
    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    retry: bool = False  # may the same request be sent again unchanged?

    def __init__(self, message: str = "", detail: Any = None, *, retry: bool | None = None) -> None:
        self.message = message or self.status.phrase
        self.detail = detail
        if retry is not None:
            self.retry = retry
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ValidationError(ApiError):
    """`ValidationError("name", "must not be empty")`; an empty field name leaves a bare message."""

    code = "validation_error"
    status = HTTPStatus.BAD_REQUEST

    def __init__(self, field: str, text: str = "", detail: Any = None) -> None:
        self.field = field
        if field:
            super().__init__(f"{field} {text}", {"field": field} if detail is None else detail)
        else:
            super().__init__(text, detail)


class BadSyntax(ApiError):
    code = "syntax_error"
    status = HTTPStatus.BAD_REQUEST


class BodyTooBig(ApiError):
    code = "request_body_too_big"
    status = HTTPStatus.BAD_REQUEST


class Unauthorized(ApiError):
    code = "unauthorized"
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(ApiError):
    code = "forbidden"
    status = HTTPStatus.FORBIDDEN


class NotFound(ApiError):
    code = "object_not_found"
    status = HTTPStatus.NOT_FOUND


class ObjectExists(ApiError):
    code = "object_exists"
    status = HTTPStatus.CONFLICT


class Conflict(ApiError):
    code = "conflict"
    status = HTTPStatus.CONFLICT


class PreconditionFailed(ApiError):
    code = "precondition_failed"
    status = HTTPStatus.PRECONDITION_FAILED


class RateLimited(ApiError):
    code = "ratelimited"
    status = HTTPStatus.TOO_MANY_REQUESTS
    retry = True


class UnknownError(ApiError):
    code = "unknown_error"


class ServiceUnavailable(ApiError):
    code = "service_unavailable"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry = True


class Unreachable(ApiError):
    """There was no (whole) answer: refused, reset, timed out, or not trusted. Raised by clients only."""

    code = "unreachable"
    status = HTTPStatus.BAD_GATEWAY
    retry = True


_ERRORS: tuple[type[ApiError], ...] = (
    BadSyntax,
    BodyTooBig,
    Unauthorized,
    Forbidden,
    NotFound,
    ObjectExists,
    Conflict,
    PreconditionFailed,
    RateLimited,
    UnknownError,
    ServiceUnavailable,
)
BY_CODE: dict[str, type[ApiError]] = {error.code: error for error in _ERRORS} | {"not_found": NotFound}

BY_STATUS: dict[int, type[ApiError]] = {
    400: BadSyntax,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    429: RateLimited,
    503: ServiceUnavailable,
}


def from_wire(status: int, code: str, message: str, detail: Any, retry: bool) -> ApiError:
    """The error a server reported, as the class it raised; an unknown code falls back to its status."""
    if code == ValidationError.code:
        error: ApiError = ValidationError("", message, detail)
        if isinstance(detail, dict):
            error.field = str(detail.get("field", ""))  # type: ignore[attr-defined]  # the class just made
    else:
        error = (BY_CODE.get(code) or BY_STATUS.get(status) or UnknownError)(message, detail)
    error.retry = retry
    return error
