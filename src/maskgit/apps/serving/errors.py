"""Why a service does not answer a request as asked: each fault has an HTTP status and a name for programs."""

from typing import ClassVar

from maskgit.errors import MaskGITError


class ServiceError(MaskGITError):
    """The base of what ends a request.

    Attributes:
        status: of HTTP.
        kind: a word that programs can go by.
        retry_after: seconds after which to try again, or None.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"
    retry_after: int | None = None


class InvalidRequestError(ServiceError):
    """The request is not one that is understood."""

    status = 422
    kind = "invalid_request"


class UnauthorizedError(ServiceError):
    """The key is missing or wrong."""

    status = 401
    kind = "unauthorized"


class ForeignError(ServiceError):
    """The server is called by another's name, or used by another site's page."""

    status = 403
    kind = "foreign"


class NotAcceptableError(ServiceError):
    """The client accepts nothing that can be made."""

    status = 406
    kind = "not_acceptable"


class SlowBodyError(ServiceError):
    """The body did not arrive in time."""

    status = 408
    kind = "slow_body"


class TooLargeError(ServiceError):
    """A body or a picture is larger than allowed."""

    status = 413
    kind = "too_large"


class UnsupportedTypeError(ServiceError):
    """The body is of a type that is not read."""

    status = 415
    kind = "unsupported_type"


class OverloadedError(ServiceError):
    """There is no place in the queue."""

    status = 429
    kind = "overloaded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClientGoneError(ServiceError):
    """The client left before its answer; nobody reads this."""

    status = 499
    kind = "client_gone"


class FailedError(ServiceError):
    """The model failed at this request."""

    status = 500
    kind = "internal"


class UnavailableError(ServiceError):
    """The service is not ready yet, or about to stop."""

    status = 503
    kind = "unavailable"


class DeadlineError(ServiceError):
    """The request was not done in time."""

    status = 504
    kind = "deadline"
