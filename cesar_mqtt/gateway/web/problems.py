"""The errors of the HTTP API: problem details (RFC 9457) for `/api`, OpenAI's shape for `/v1`. Pure values."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

OPENAI_PREFIX = "/v1/"


class ProblemError(Exception):
    """An HTTP request that cannot be fulfilled.

    Attributes:
        status: the HTTP status.
        detail: a sentence with what to do.
        code: the same for programs: a `reason` of a rejection, an `error_code` of a job, or a word of this API.
        field: the field of the request that is wrong; None: none in particular.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        code: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code
        self.field = field
        self.headers = dict(headers or {})


def response_to(path: str, error: ProblemError) -> Response:
    """Return the response to a request for `path` that failed."""
    if path.startswith(OPENAI_PREFIX):
        return JSONResponse({"error": openai_error(error)}, error.status, headers=error.headers)
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
    }
    return JSONResponse(body, error.status, headers=error.headers, media_type="application/problem+json")


def openai_error(error: ProblemError) -> dict[str, Any]:
    """Return the object `error` as OpenAI's API has it."""
    kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    if error.status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "requests"
    return {"message": error.detail, "type": kind, "param": error.field, "code": error.code}
