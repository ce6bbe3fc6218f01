"""``create_app``: the routes of one server, with its limits around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..blocks import Blocks
from ..engines.request import Engine
from . import status_routes
from .answer_schemas import (
    ChatAnswer,
    CompletionAnswer,
    CompressAnswer,
    ErrorAnswer,
    ModelCard,
    ModelList,
)
from .chat import chat
from .completions import completions
from .compress_route import compress
from .errors import http_error
from .fetching import Fetcher
from .front import Front
from .limits import Limits
from .request_record import record_of
from .schemas import REQUESTS
from .settings import ServerSettings

_SCHEMAS = "#/components/schemas/"
_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer, "description": "An error"}}


def create_app(
    settings: ServerSettings,
    engine: Engine,
    blocks: Blocks,
    model: Any,
    processor: Any,
    model_name: str,
    *,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """The server as an ASGI app. ``app.state.front`` is what its routes work with.

    Blocks and engine are started and stopped with it (ASGI's lifespan).

    Args:
        settings: limits.
        engine: answers.
        blocks: compresses and keeps images.
        model: attached, in evaluation mode.
        processor: its processor, with a chat template.
        model_name: what clients call it.
        fetcher: of remote images; made of ``settings`` where left out.
    """
    front = Front(settings, engine, blocks, model, processor, model_name, fetcher)
    app = FastAPI(
        title="voco serve", summary="Images compressed once, asked about at will", lifespan=_lifespan,
        docs_url=None, redoc_url=None, redirect_slashes=False, responses=_ERRORS,
    )  # fmt: skip
    app.state.front = front
    _add_routes(app, front)
    app.add_middleware(Limits, settings=settings, queue=front.queue, metrics=front.metrics)
    app.add_exception_handler(HTTPException, _http_error)
    plain = app.openapi
    app.openapi = lambda: _with_requests(plain())  # type: ignore[method-assign]
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    front: Front = app.state.front
    front.open()
    await asyncio.to_thread(front.blocks.start)
    try:
        await asyncio.to_thread(front.engine.start)
        yield
    finally:
        front.queue.draining = True
        try:
            await asyncio.to_thread(front.engine.stop, front.settings.drain_seconds)
        finally:
            await asyncio.to_thread(front.blocks.stop)
            front.close()


def _add_routes(app: FastAPI, front: Front) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_takes("ChatRequest"), responses=_streamed(ChatAnswer))
    async def chat_completions(request: Request) -> Response:
        return await chat(front, request)

    @app.post(
        "/v1/completions", openapi_extra=_takes("CompletionRequest"), responses=_streamed(CompletionAnswer)
    )
    async def text_completions(request: Request) -> Response:
        return await completions(front, request)

    @app.post(
        "/v1/voco/compress",
        openapi_extra=_takes("CompressRequest"),
        responses={200: {"model": CompressAnswer}},
    )
    async def voco_compress(request: Request) -> Response:
        return await compress(front, request)

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        return status_routes.models(front)

    @app.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}})
    async def model(name: str) -> Response:
        return status_routes.model(front, name)

    @app.get("/health", responses={503: {"description": "Not ready"}})
    async def health() -> Response:
        return status_routes.health(front)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return status_routes.metrics(front)


async def _http_error(request: Request, problem: Exception) -> Response:
    """404 and 405, in the shape of every other error."""
    assert isinstance(problem, HTTPException)
    error = http_error(problem.status_code, str(problem.detail), request.url.path, problem.headers)
    record_of(request.scope).failed(error)
    return Response(error.text(), error.status, error.headers, "application/json")


# -- what the routes take, for whoever reads /openapi.json: they read their bodies themselves


def _takes(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + schema}}}
    return {"requestBody": {"required": True, "content": content}}


def _streamed(kind: Any) -> dict[int | str, dict[str, Any]]:
    """Whole, or as events, each a JSON text."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": kind, "content": events, "description": "The answer"}}


def _with_requests(document: dict[str, Any]) -> dict[str, Any]:
    _, made = models_json_schema(
        [(kind, "validation") for kind in REQUESTS], ref_template=_SCHEMAS + "{model}"
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(made["$defs"])
    return document


__all__ = ["create_app"]
