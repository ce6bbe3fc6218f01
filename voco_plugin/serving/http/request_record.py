"""``RequestRecord``: what is noted of one request while it runs; the log and the metrics come of it.

Nothing of what a client sent is in it: no prompt, image, URL or key.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .errors import ApiError

SCOPE_KEY = "voco_plugin.record"


@dataclass
class RequestRecord:
    """Of one request.

    Attributes:
        id: random; also the answer's ``x-request-id``.
        route: the path as the API writes it.
        status: of HTTP; ``None`` where nothing was sent.
        outcome: ``ok``, ``client_error``, ``server_error``, ``timeout`` or ``client_gone``.
        code: of the error, where there was one.
        places: of the bounded queue that it holds.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    route: str = "other"
    status: int | None = None
    outcome: str = ""
    code: str | None = None
    stream: bool = False
    choices: int = 0
    images: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    voco_tokens: int = 0
    completion_tokens: int = 0
    finish: list[str] = field(default_factory=list)
    places: int = 0
    started: float = field(default_factory=time.perf_counter)
    read_seconds: float | None = None
    prepared_seconds: float | None = None
    first_token_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.started

    def failed(self, error: ApiError) -> None:
        """It ends with ``error``."""
        self.code = error.code
        self.outcome = (
            "timeout" if error.status == 504 else "server_error" if error.status >= 500 else "client_error"
        )

    def line(self) -> dict[str, Any]:
        """What the log says of it; what it did not come to is left out."""
        whole = {
            "request": self.id, "method": self.method, "route": self.route, "status": self.status,
            "outcome": self.outcome, "code": self.code, "seconds": round(self.seconds, 4),
            "read_seconds": _round(self.read_seconds), "prepared_seconds": _round(self.prepared_seconds),
            "first_token_seconds": _round(self.first_token_seconds), "stream": self.stream or None,
            "choices": self.choices or None, "images": self.images or None, "hits": self.hits or None,
            "prompt_tokens": self.prompt_tokens or None, "voco_tokens": self.voco_tokens or None,
            "completion_tokens": self.completion_tokens or None, "finish": self.finish or None,
        }  # fmt: skip
        return {name: value for name, value in whole.items() if value is not None}


def record_of(scope: Any) -> RequestRecord:
    """The record of the request with this ASGI scope; a new one where nobody keeps any."""
    return scope.setdefault(SCOPE_KEY, RequestRecord())


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


__all__ = ["SCOPE_KEY", "RequestRecord", "record_of"]
