"""A request's JSON → its schema, or one sentence about the first field that is wrong.

A field that OpenAI has and this server cannot honour is refused by name; one that changes no answer is taken
and dropped; one that nobody has is refused with the nearest that is known.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...config import nearest
from .errors import ApiError
from .front import Front
from .json_text import load

T = TypeVar("T", bound=BaseModel)

_LARGE = 1 << 16
_NO_TOOLS = "this model calls no tools"
_NO_AUDIO = "answers are text"
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": (_NO_TOOLS, (True, False)),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "response_format": ("answers are free text", ({"type": "text"},)),
    "modalities": (_NO_AUDIO, (["text"],)),
    "audio": (_NO_AUDIO, ()),
    "prediction": ("nothing is predicted", ()),
    "store": ("answers are not kept", (False,)),
    "metadata": ("answers are not kept", ({},)),
    "moderation": ("nothing is moderated", ()),
    "reasoning_effort": ("this model does not reason apart", ("none",)),
    "verbosity": ("this model has no such setting", ("medium",)),
    "web_search_options": ("nothing is searched", ()),
    "service_tier": ("there is one tier", ("auto", "default")),
    "prompt_cache_retention": ("blocks stay as long as the store keeps them", ()),
    "prompt_cache_options": ("blocks stay as long as the store keeps them", ()),
    "best_of": ("answers are not ranked", (1,)),
    "echo": ("the prompt is not sent back", (False,)),
    "suffix": ("text is written at the end only", ("",)),
    "min_tokens": ("an answer ends where the model ends it", (0,)),
    "min_p": ("use top_p or top_k", (0,)),
    "repetition_penalty": ("use presence_penalty or frequency_penalty", (1,)),
}  # fmt: skip
"""What is known elsewhere and not here: why, and the values that ask for nothing."""
_WANTED = {
    "model_type": "an object", "model_attributes_type": "an object", "dict_type": "an object",
    "list_type": "a list", "string_type": "a text",
}  # fmt: skip
IGNORED = ("safety_identifier", "prompt_cache_key")
"""Who asks, and hints: no answer depends on them. (``user`` is a field of the schema.)"""


async def read_request(kind: type[T], front: Front, body: bytes) -> T:
    """As :func:`parse_request`, a large body in another thread: others' answers go on meanwhile."""
    if len(body) > _LARGE:
        return await front.in_media_thread(parse_request, kind, body)
    return parse_request(kind, body)


def parse_request(kind: type[T], body: bytes) -> T:
    """The request in ``body``.

    Raises:
        ApiError: it is no JSON object of this schema.
    """
    try:
        given = load(body)
    except ValueError as problem:
        raise ApiError(str(problem), None, "invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(f"the body is {_called(given)}; send a JSON object.", None, "invalid_json")
    known = kind.model_fields
    for name in [name for name in given if name not in known]:
        value = given.pop(name)
        if name in IGNORED or (value is None and name in REFUSED):
            continue
        if name not in REFUSED:
            raise ApiError(
                f"{name[:40]!r} is no field of this request{nearest(name[:40], known)}; take it out.",
                name[:40], "unknown_field",
            )  # fmt: skip
        reason, harmless = REFUSED[name]
        if not any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in harmless):
            raise ApiError(
                f"{name}={_shown(value)} cannot be honoured: {reason}; leave it out.",
                name,
                "unsupported_field",
            )
    try:
        return kind.model_validate(given)
    except ValidationError as problem:
        raise _field_error(problem, given) from None


def _field_error(problem: ValidationError, given: Any) -> ApiError:
    """The error of the deepest field: where a value may be one of several types, that of the type it is
    nearest to."""
    errors = problem.errors(include_url=False)
    first = errors[0]["loc"][:1]
    depths = [len(_path(one["loc"], given)) for one in errors if one["loc"][:1] == first]
    error = errors[depths.index(max(depths))]
    path = _path(error["loc"], given)
    name = _written(path) or "the body"
    kind, context = error["type"], error.get("ctx", {})
    value = error.get("input")
    if kind == "missing":
        text = f"{name} is missing; give it."
    elif kind == "extra_forbidden":
        text = f"{name} is no field of this request; take it out."
    elif kind == "union_tag_invalid":
        tag = str(value.get("type"))[:40] if isinstance(value, dict) else ""
        known = ("text", "image_url", "video_url", "voco")
        text = f"{name}.type={tag!r} is not known{nearest(tag, known)}; use {', '.join(known)}."
    elif kind == "union_tag_not_found":
        text = f"{name} has no type; give text, image_url, video_url or voco."
    elif kind in _WANTED:
        here = [one["type"] for one in errors if _path(one["loc"], given) == path]
        wanted = dict.fromkeys(_WANTED[one] for one in here if one in _WANTED)
        text = f"{name} is {_called(value)}; give {' or '.join(wanted)}."
    elif kind == "too_long":
        text = f"{name} holds {context.get('actual_length')} entries, which cannot be honoured; leave it out."
    elif kind == "none_required":
        text = f"{name}={_shown(value)} cannot be honoured; leave it out."
    else:
        message = error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
        text = f"{name}={_shown(value)}: it should be {message[:1].lower()}{message[1:]}."
    return ApiError(text, _written(path) or None, "invalid_value")


def _path(location: tuple[Any, ...], given: Any) -> list[Any]:
    """``location`` without the names of types that pydantic puts between fields."""
    path: list[Any] = []
    here = given
    for number, step in enumerate(location):
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        )
        if inside:
            here = here[step]
            path.append(step)
        elif number == len(location) - 1 and isinstance(here, dict) and isinstance(step, str):
            path.append(step)  # the one that is missing
    return path


def _written(path: list[Any]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{str(step)[:40]}" if text else str(step)[:40]
    return text


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else _called(value)
    return text if len(text) <= 60 else f"{text[:40]}…"


def _called(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


__all__ = ["IGNORED", "REFUSED", "parse_request", "read_request"]
