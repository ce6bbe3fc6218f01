"""Logs as JSON, a line each: one a request (:mod:`.request_record`), and whatever else the server says.

{"time": "2026-11-30T09:06:49.123Z", "level": "info", "logger": "…", "request": "…", "route": "…", …}
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, TextIO

from .request_record import RequestRecord

requests = logging.getLogger("voco_plugin.serving.requests")
_EXTRA = "voco_line"


class JSONFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, _EXTRA, None)
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_request(record: RequestRecord) -> None:
    """The line of a request that has ended."""
    line = record.line()
    level = logging.ERROR if record.outcome == "server_error" else logging.INFO
    requests.log(level, "%s %s %s", record.method, record.route, record.status, extra={_EXTRA: line})


def write_logs(stream: TextIO, level: int = logging.INFO) -> logging.Handler:
    """Send what the package and uvicorn log to ``stream`` as JSON; the handler, to be taken off again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    for name in ("voco_plugin", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("uvicorn.access").disabled = True  # it would write the same again, without the tokens
    return handler


__all__ = ["JSONFormatter", "log_request", "requests", "write_logs"]
