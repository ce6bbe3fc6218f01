"""Answers as OpenAI has them, with what this server has beyond: the models behind ``/openapi.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorInside(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorInside


class PromptDetails(BaseModel):
    """What the prompt was made of. ``saved_vision_tokens``: vision tokens that were not read, as VoCo tokens
    stand for them. ``cached_tokens``: VoCo tokens of blocks that were kept before."""

    text_tokens: int
    voco_tokens: int
    saved_vision_tokens: int
    cached_tokens: int


class Usage(BaseModel):
    """Tokens: of the prompt once, of all answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token in the place of another."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that was said."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a whole answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """An answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """Of ``POST /v1/chat/completions`` where it is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Of a whole text; ``top_logprobs`` by the token's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    """Of ``POST /v1/completions`` where it is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompressAnswer(BaseModel):
    """What was kept. ``vision_tokens`` are those that the blocks stand for."""

    object: Literal["voco.block"] = "voco.block"
    key: str
    bytes: int
    num_tokens: int
    vision_tokens: int
    blocks: int
    hit: bool


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "voco_plugin"


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


__all__ = [
    "ChatAnswer",
    "CompletionAnswer",
    "CompressAnswer",
    "ErrorAnswer",
    "ModelCard",
    "ModelList",
    "PromptDetails",
    "Usage",
]
