"""``POST /v1/voco/compress``: an image or a video now, its key for the questions to come."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..blocks import Compressed
from .answer_schemas import CompressAnswer
from .client_gone import unless_gone
from .errors import ApiError
from .front import Front
from .prompt_building import check_num_tokens, compressed_image, compressed_video
from .request_fields import read_request
from .request_record import record_of
from .schemas import CompressRequest


async def compress(front: Front, request: Request) -> Response:
    """Compress one image or video, or find it kept.

    Raises:
        ApiError: the request is wrong, or the image cannot be had or read.
    """
    until = front.until()
    asked = await read_request(CompressRequest, front, await request.body())
    front.check_model(asked.model)
    if (asked.image is None) == (asked.video is None):
        raise ApiError("give an image or a video, one of the two.", "image")
    found = await unless_gone(request.receive, _compressed(front, asked), until)
    front.metrics.compressed(found)
    record = record_of(request.scope)
    record.images, record.hits = 1, int(found.hit)
    blocks = found.cache.blocks
    answer = CompressAnswer(
        key=found.key, bytes=found.cache.nbytes, num_tokens=sum(b.num_tokens for b in blocks),
        vision_tokens=sum(b.num_vision for b in blocks), blocks=len(blocks), hit=found.hit,
    )  # fmt: skip
    return JSONResponse(answer.model_dump())


async def _compressed(front: Front, asked: CompressRequest) -> Compressed:
    check_num_tokens(front, asked.num_tokens)
    if asked.image is not None:
        return await compressed_image(front, asked.image, asked.num_tokens, "image")
    return await compressed_video(front, asked.video or "", asked.num_tokens, "video")


__all__ = ["compress"]
