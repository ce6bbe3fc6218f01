"""``GET /v1/models``, ``/health`` and ``/metrics``: what there is, and how it does."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from .answer_schemas import ModelCard, ModelList
from .front import Front
from .metrics import CONTENT_TYPE, state_of


def models(front: Front) -> Response:
    """All models: the one."""
    return JSONResponse(ModelList(data=[_card(front)]).model_dump())


def model(front: Front, name: str) -> Response:
    """One model.

    Raises:
        ApiError: it is not this one.
    """
    front.check_model(name)
    return JSONResponse(_card(front).model_dump())


def health(front: Front) -> Response:
    """200 while requests are taken and answered, 503 otherwise."""
    engine, blocks = state_of(front.engine.state), state_of(front.blocks.state)
    ready = bool(engine.get("ready")) and blocks.get("ready", True) and not front.queue.draining
    status = "stopping" if front.queue.draining else "ok" if ready else "not ready"
    body = {"status": status, "model": front.model_name, "engine": engine, "blocks": blocks}
    return JSONResponse(body, status_code=200 if ready else 503)


def metrics(front: Front) -> Response:
    """For Prometheus."""
    return Response(front.metrics.text(), media_type=CONTENT_TYPE)


def _card(front: Front) -> ModelCard:
    return ModelCard(id=front.model_name, created=front.created)


__all__ = ["health", "metrics", "model", "models"]
