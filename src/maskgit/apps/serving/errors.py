"""Why a service does not answer a request as asked: each error has an HTTP status and a type for programs."""

from typing import ClassVar

from maskgit.errors import MaskGITError


class ServiceError(MaskGITError):
    """The base of all errors that end a request.

    Attributes:
        status: of HTTP.
        kind: the type that programs go by.
        retry_after: seconds after which to try again, or None.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"
    retry_after: int | None = None


class InvalidRequestError(ServiceError):
    """The request is invalid."""

    status = 422
    kind = "invalid_request"


class UnauthorizedError(ServiceError):
    """The API key is missing or wrong."""

    status = 401
    kind = "unauthorized"


class ForeignError(ServiceError):
    """The host name is not the server's, or another site's page sent the request."""

    status = 403
    kind = "foreign"


class NotFoundError(ServiceError):
    """There is no such model."""

    status = 404
    kind = "not_found"


class SlowBodyError(ServiceError):
    """The body did not arrive in time."""

    status = 408
    kind = "slow_body"


class TooLargeError(ServiceError):
    """A body, an image or a result is larger than allowed."""

    status = 413
    kind = "too_large"


class UnsupportedTypeError(ServiceError):
    """The body's content type is not supported."""

    status = 415
    kind = "unsupported_type"


class OverloadedError(ServiceError):
    """The queue is full."""

    status = 429
    kind = "overloaded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClientGoneError(ServiceError):
    """The client disconnected before its answer."""

    status = 499
    kind = "client_gone"


class FailedError(ServiceError):
    """The server failed on this request."""

    status = 500
    kind = "internal"


class UnavailableError(ServiceError):
    """The service is not ready yet, or is shutting down."""

    status = 503
    kind = "unavailable"


class DeadlineError(ServiceError):
    """The request was not finished in time."""

    status = 504
    kind = "deadline"
