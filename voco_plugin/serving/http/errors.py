"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from ...data.images import BadImageError
from ..blocks import UnknownKeyError
from ..engines.request import EngineError, RequestError
from .json_text import dump

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout",
    429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout",
}  # fmt: skip
INTERNAL = "the server failed at this request; its log says why."


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        param: the field at fault, or ``None``.
        code: a word for programs, or ``None``.
        headers: more of the answer's headers.
        reason: a word for the metric of refused requests, or ``None``.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        status: int = 400,
        headers: dict[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers, self.reason = headers or {}, reason

    def body(self) -> dict[str, Any]:
        """As OpenAI has it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def text(self) -> str:
        """The body as JSON."""
        return dump(self.body())


def api_error(error: BaseException) -> ApiError:
    """What a client is told of ``error``. Of one that nobody foresaw, nothing but that there was one; the log
    has it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(str(error), error.param, error.code)
    if isinstance(error, UnknownKeyError):
        return ApiError(str(error), "messages", "unknown_key", status=404)
    if isinstance(error, BadImageError):
        return ApiError(str(error), "messages", "invalid_image")
    if isinstance(error, EngineError):
        return ApiError(
            f"the engine failed: {error}", None, "engine_error", status=503, headers={"Retry-After": "1"}
        )
    logger.error("a request failed", exc_info=error)
    return ApiError(INTERNAL, None, "internal_error", status=500)


def http_error(status: int, detail: str, path: str, headers: Any = None) -> ApiError:
    """What the router found wrong."""
    if status == 404:
        message = (
            f"there is no {path[:100]!r}; the routes are /v1/chat/completions, /v1/completions, /v1/models, "
        )
        message += "/v1/voco/compress, /health and /metrics."
        return ApiError(message, None, "unknown_url", status=404)
    if status == 405:
        allowed = str(dict(headers or {}).get("Allow", "another method"))
        message = f"{path[:100]} does not take this method; use {allowed}."
        return ApiError(message, None, "method_not_allowed", status=405, headers={"Allow": allowed})
    return ApiError(detail or HTTPStatus(status).phrase, None, None, status=status)


__all__ = ["ApiError", "api_error", "http_error"]
