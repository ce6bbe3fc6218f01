"""What every request passes before it reaches a route: whose it is, whether there is room, and its body,
whole and within its limits. Pure ASGI, so that a route sees the connection itself, and its client leaving.

    host name → stopping? → key → a place in the queue → the body → the route → the log
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, api_error
from .logs import log_request
from .metrics import Metrics
from .request_record import SCOPE_KEY, RequestRecord
from .settings import ServerSettings

_OPEN = ("/health",)


class Queue:
    """Answers that may run and wait at a time.

    Attributes:
        draining: no new request is taken.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.size = settings.max_running + settings.max_waiting
        self.taken, self.draining, self._retry = 0, False, str(settings.retry_after)

    def enter(self, record: RequestRecord, places: int = 1) -> None:
        """Take ``places`` more for a request.

        Raises:
            ApiError: there are not as many.
        """
        if self.taken + places > self.size:
            raise ApiError(
                f"{self.taken} of {self.size} places are taken and this request needs {places} more; send it "
                "again later.",
                None, "queue_full", status=429, headers={"Retry-After": self._retry}, reason="queue_full",
            )  # fmt: skip
        self.taken += places
        record.places += places

    def leave(self, record: RequestRecord) -> None:
        """Give back what a request holds."""
        self.taken -= record.places
        record.places = 0


class Limits:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, queue: Queue, metrics: Metrics) -> None:
        self.app, self.settings, self.queue, self.metrics = app, settings, queue, metrics
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = {name.lower() for name in settings.host_names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope[SCOPE_KEY] = RequestRecord(method=scope["method"])

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._passed(scope, receive, noting, record)
        except ApiError as error:
            record.failed(error)
            if error.reason is not None:
                self.metrics.rejected.labels(error.reason).inc()
            await send_error(noting, error)
        except ClientGoneError:
            record.outcome = "client_gone"
        except Exception as problem:
            if record.status is not None:  # an answer has begun: no other can be sent
                record.outcome = "server_error"
                raise
            told = api_error(problem)
            record.failed(told)
            await send_error(noting, told)
        except asyncio.CancelledError:
            record.outcome = record.outcome or "cancelled"
            raise
        except BaseException:
            record.outcome = "server_error"
            raise
        finally:
            self.queue.leave(record)
            self._noted(scope, record)

    def _noted(self, scope: Scope, record: RequestRecord) -> None:
        record.route = getattr(scope.get("route"), "path", record.route)
        if not record.outcome:
            status = record.status or 500
            record.outcome = "ok" if status < 400 else "client_error" if status < 500 else "server_error"
        self.metrics.requests.labels(record.route, record.outcome).inc()
        log_request(record)

    async def _passed(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        self._check_host([value for name, value in headers if name == b"host"])
        if scope["path"] not in _OPEN:
            self._check_draining()
            self._check_key([value for name, value in headers if name == b"authorization"])
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        self._check_type([value for name, value in headers if name == b"content-type"])
        self._check_length([value for name, value in headers if name == b"content-length"])
        self.queue.enter(record)
        body = await self._read(receive)
        record.read_seconds = record.seconds
        await self.app(scope, _replay(body, receive), send)

    # -- the checks

    def _check_host(self, given: list[str]) -> None:
        if self._hosts and (len(given) != 1 or _without_port(given[0]) not in self._hosts):
            raise ApiError(
                "this server is not called by this name; use one that it was started with.",
                None, "unknown_host", status=421, reason="host",
            )  # fmt: skip

    def _check_draining(self) -> None:
        if self.queue.draining:
            raise ApiError(
                "the server is stopping and takes no new request; send it again later.",
                None, "stopping", status=503, reason="stopping",
                headers={"Retry-After": str(self.settings.retry_after), "Connection": "close"},
            )  # fmt: skip

    def _check_key(self, given: list[str]) -> None:
        if not self._keys:
            return
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = _digest(key.strip(), "latin-1")
        # all are compared, each in constant time: neither which nor how much of it was right can be measured
        right = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() == "bearer" and any(right):
            return
        wrong = "this API key is not known" if given else "there is no API key"
        raise ApiError(
            f"{wrong}; send 'Authorization: Bearer KEY' with a key of this server.",
            None, "invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"}, reason="key",
        )  # fmt: skip

    @staticmethod
    def _check_type(given: list[str]) -> None:
        """A web page may send any other type to this machine without asking; not this one."""
        kind = given[0].partition(";")[0].strip().lower() if len(given) == 1 else ""
        if kind != "application/json":
            raise ApiError(
                f"Content-Type {kind[:60]!r} is not read; send 'Content-Type: application/json'.",
                None, "unsupported_media_type", status=415, reason="type",
            )  # fmt: skip

    def _check_length(self, given: list[str]) -> None:
        if given and given[0].isdecimal() and int(given[0][:20]) > self.settings.max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body has more than {self.settings.max_body} bytes; send smaller images, or compress them "
            "one by one (/v1/voco/compress) and name their keys.",
            None, "body_too_large", status=413, reason="body", headers={"Connection": "close"},
        )  # fmt: skip

    async def _read(self, receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(self._whole(receive), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                f"the body did not come within {self.settings.body_seconds:g} s; send it again, faster.",
                None, "slow_body", status=408, reason="slow_body", headers={"Connection": "close"},
            ) from None  # fmt: skip

    async def _whole(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > self.settings.max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


async def send_error(send: Send, error: ApiError) -> None:
    """``error`` as a whole HTTP answer."""
    body = error.text().encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """``body`` once, then what the connection says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _digest(key: str, encoding: str = "utf-8") -> bytes:
    return hashlib.sha256(key.encode(encoding, "replace")).digest()


def _without_port(host: str) -> str:
    name = host.strip().lower()
    if name.startswith("["):  # IPv6
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


__all__ = ["ClientGoneError", "Limits", "Queue", "send_error"]
