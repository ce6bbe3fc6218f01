"""Requests as OpenAI has them, and this server's own: the fields it honours, with their ranges.

What OpenAI has beyond these is in :mod:`.request_fields`, which says of each why it is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_INT64 = 2**63


class Strict(BaseModel):
    """No field beside those named, no value read as another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Empty(Strict):
    """What clients send back to no effect, null or empty."""

    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    name: None = None


class TextPart(Strict):
    """Words."""

    type: Literal["text"]
    text: str


class URL(Strict):
    """Where an image or video is. ``detail`` says nothing here: a block has K tokens whatever it shows."""

    url: str = Field(min_length=1)
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """An image: a data URL, or one that the server may fetch."""

    type: Literal["image_url"]
    image_url: URL


class VideoPart(Strict):
    """A video as a data URL."""

    type: Literal["video_url"]
    video_url: URL


class KeptPart(Strict):
    """An image or video that the server has compressed before."""

    type: Literal["voco"]
    key: str


Part = Annotated[TextPart | ImagePart | VideoPart | KeptPart, Field(discriminator="type")]


class Message(Empty):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Strict):
    """How answers are drawn, alike for chats and completions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    num_tokens: int | None = Field(None, ge=1, lt=2**31)


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``: texts, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)


class CompressRequest(Strict):
    """``POST /v1/voco/compress``: an image (data URL, or one to fetch) or a video (data URL)."""

    image: str | None = Field(None, min_length=1)
    video: str | None = Field(None, min_length=1)
    num_tokens: int | None = Field(None, ge=1, lt=2**31)
    model: str | None = None


REQUESTS = (ChatRequest, CompletionRequest, CompressRequest)

__all__ = [
    "REQUESTS",
    "ChatRequest",
    "CompletionRequest",
    "CompressRequest",
    "ImagePart",
    "KeptPart",
    "Message",
    "SamplingFields",
    "TextPart",
    "VideoPart",
]
