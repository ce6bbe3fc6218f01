"""``VoCoProcessor``: a model's own processor, whose calls put the VoCo tokens in.

    VoCoProcessor(processor, model)   →   type("LlavaProcessor", (VoCoProcessor, LlavaProcessor), {})

The class of the processor is extended, as :mod:`~voco_plugin.core.extension` does with models: what asks for
a ``ProcessorMixin`` or for the family's own class gets one, and everything but the call is the family's code.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from transformers import ProcessorMixin

from ..config import VoCoConfig
from ..core.layout import TokenVocabulary, pad_id_of, plain_processor, tokenizer_of
from ..core.processor_output import Lengths, holds_images, insert_into_output
from .insertion_target import InsertionTarget

MARK = "voco_processor"
"""The key of ``processor_config.json`` that says that the processor which was saved puts VoCo tokens in."""

_CLASSES: dict[type, type] = {}
_LOCK = threading.Lock()
_ASKED: ContextVar[Any] = ContextVar("num_tokens of the chat template's call", default=None)
_NO_LIMIT = 10**9  # tokenizers without a length of their own say 1e30


@dataclass(frozen=True)
class _Settings:
    target: InsertionTarget
    num_tokens: int | None


class VoCoProcessor(ProcessorMixin):
    """A processor over a model's own that puts K VoCo tokens after each image or video, in ``__call__`` and
    in ``apply_chat_template(…, tokenize=True)``; ``pipeline``, demos and collators of other libraries take
    it.

    It is a second view of ``processor``: an instance of its class too, with the same tokenizer, image
    processor and chat template; what is set on one is set on both. Both calls take ``num_tokens=`` (K,
    elastic; one number, or one a row) besides their own arguments. ``max_length`` counts the VoCo tokens, and
    no image is cut through. Texts that hold the same number of VoCo tokens after an image already are left as
    they are; rows without images are untouched.

    ``save_pretrained`` notes it in ``processor_config.json``: :func:`voco_plugin.load` and
    ``VoCoProcessor.from_pretrained`` give it back, ``AutoProcessor`` gives the ordinary one.

    Args:
        processor: the model's own.
        model_or_config: the attached model, wrapped or not; or the :class:`~voco_plugin.VoCoConfig`, where
            the tokenizer has the VoCo token already.
        num_tokens: K of every call; ``None`` takes the config's, as it is at the call.

    Raises:
        ValueError: no processor of transformers, the model is not attached, or the tokenizer does not have
            the VoCo token. A call raises :class:`~voco_plugin.LayoutError` where a text holds another number
            of VoCo tokens, neighbouring images cannot be told apart, or ``max_length`` would cut an image.
    """

    __slots__ = ("_voco_base", "_voco_settings")
    _voco_base: Any
    _voco_settings: _Settings

    def __new__(cls, processor: Any, model_or_config: Any, num_tokens: int | None = None) -> VoCoProcessor:
        plain = plain_processor(processor)
        if not isinstance(plain, ProcessorMixin):
            raise ValueError(
                f"{type(plain).__name__} is no processor of a vision-language model (transformers' "
                "ProcessorMixin); give what AutoProcessor.from_pretrained returns."
            )
        target = InsertionTarget.of(model_or_config, plain)
        return _over(plain, _Settings(target, _checked(num_tokens)))

    def __init__(self, processor: Any, model_or_config: Any, num_tokens: int | None = None) -> None:
        """Nothing is left to do: ``__new__`` took the processor's own attributes."""

    @property
    def plain(self) -> Any:
        """The ordinary processor, which puts nothing in."""
        return self._voco_base

    @property
    def num_voco_tokens(self) -> int:
        """K of a call that names none."""
        settings = self._voco_settings
        return settings.num_tokens or settings.target.config.num_tokens

    def _voco_plain(self) -> Any:
        return self._voco_base

    def __call__(self, *args: Any, num_tokens: int | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The processor's own output, with VoCo tokens in it; see the class."""
        count = _ASKED.get() if num_tokens is None else num_tokens
        plain, target = self._voco_base, self._voco_settings.target
        count = self.num_voco_tokens if count is None else _checked(count)
        target.check(plain)
        given = _bound(plain, args, kwargs)
        images, options, kwargs = _images_per_row(plain, given), _Options(), dict(kwargs)
        if _has_visuals(given):
            options, kwargs = _without_lengths(plain, kwargs)
        output = super().__call__(*args, **kwargs)
        if "input_ids" not in output or not holds_images(output, target.vocab):
            return output
        made = insert_into_output(output, target.vocab, count, options.lengths(plain, kwargs), images)
        return type(output)(made)

    def apply_chat_template(
        self, *args: Any, num_tokens: int | Sequence[int] | None = None, **kwargs: Any
    ) -> Any:
        """The processor's own, with its arguments; its tokenization calls this processor.

        Args:
            num_tokens: K of this call, one number or one a row; ``None`` takes :attr:`num_voco_tokens`.
        """
        token = _ASKED.set(num_tokens)
        try:
            return super().apply_chat_template(*args, **kwargs)
        finally:
            _ASKED.reset(token)

    # -- saving and copies
    # -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The processor's own, and under :data:`MARK` what puts the VoCo tokens in."""
        target = self._voco_settings.target
        config = target.config.to_dict()
        record = {
            "voco": config,
            "vocabulary": target.vocab.to_dict(),
            "num_tokens": self._voco_settings.num_tokens,
        }
        return {**super().to_dict(), MARK: record}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, model_or_config: Any = None, **kwargs: Any
    ) -> Any:
        """What ``save_pretrained`` of a :class:`VoCoProcessor` wrote; arguments as ``AutoProcessor`` has
        them.

        Args:
            pretrained_model_name_or_path: the folder or hub id.
            model_or_config: what it is to put VoCo tokens in for; ``None`` takes what was saved with it.

        Raises:
            ValueError: an ordinary processor was saved there, and no ``model_or_config`` is given.
        """
        from transformers import AutoProcessor

        plain = AutoProcessor.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        record = saved_mark(pretrained_model_name_or_path, **kwargs)
        if record is None and model_or_config is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds an ordinary processor, and nothing says which VoCo "
                "tokens to put in; give model_or_config=…, or voco_plugin.load(…, inserting=True)."
            )
        if model_or_config is not None:
            return VoCoProcessor(plain, model_or_config, None if record is None else record["num_tokens"])
        assert record is not None
        config, vocab = VoCoConfig.from_dict(record["voco"]), TokenVocabulary.from_dict(record["vocabulary"])
        known = InsertionTarget.of(config, plain)
        return _over(plain, _Settings(replace(known, vocab=vocab), record["num_tokens"]))

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Those of the processor's own class."""
        own = _base_of(cls)
        return super().get_attributes() if own is None else own.get_attributes()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _over, (self._voco_base, self._voco_settings)

    def __copy__(self) -> Any:
        return _over(copy.copy(self._voco_base), self._voco_settings)

    def __repr__(self) -> str:
        return f"VoCoProcessor (K={self.num_voco_tokens}) over {self._voco_base!r}"


def saved_mark(folder: Any, **hub: Any) -> dict[str, Any] | None:
    """What the processor saved in ``folder`` (or a hub repository) says of VoCo tokens; ``None``: nothing."""
    values, _ = ProcessorMixin.get_processor_dict(folder, **hub)
    return values.get(MARK)


def _over(plain: Any, settings: _Settings) -> Any:
    kind = _extended(type(plain))
    made: Any = object.__new__(kind)
    object.__setattr__(made, "__dict__", vars(plain))  # one set of attributes, whichever view they are set on
    made._voco_base, made._voco_settings = plain, settings
    return made


def _extended(base: type) -> type:
    """``base`` with :class:`VoCoProcessor` before it, under the same name: families and files go by it."""
    with _LOCK:
        made = _CLASSES.get(base)
        if made is None:
            made = type(base.__name__, (VoCoProcessor, base), _members(base))
            _CLASSES[base] = made
    return made


def _members(base: Any) -> dict[str, Any]:
    """``__init__`` and ``__call__`` with the signatures of the family's: transformers and others read the
    names of arguments off them.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return VoCoProcessor.__call__(self, *args, **kwargs)

    __init__.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]
    own = inspect.signature(base.__call__)
    parameters = list(own.parameters.values())
    at = sum(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters)
    more = inspect.Parameter("num_tokens", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters.insert(at, more)
    __call__.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return {**names, "__slots__": (), "__init__": __init__, "__call__": __call__}


def _base_of(cls: type) -> Any:
    """The family's own class that ``cls`` extends; ``None`` for :class:`VoCoProcessor` itself."""
    return next((base for base, made in _CLASSES.items() if made is cls), None)


def _checked(num_tokens: Any) -> Any:
    """``num_tokens`` as it is, or ``ValueError``."""
    values = (
        num_tokens if isinstance(num_tokens, (list, tuple)) else [1 if num_tokens is None else num_tokens]
    )
    if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in values):
        raise ValueError(
            f"num_tokens={num_tokens!r} must be a whole number of at least 1, or one for each row."
        )
    return num_tokens


# -- arguments of a call
# ------------------------------------------------------------------------------------------------------------


def _bound(plain: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; families differ in their order."""
    try:
        found = inspect.signature(plain.__call__).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the processor's own call says what is wrong with them
        return dict(kwargs)
    return {**found, **found.get("kwargs", {})}


def _has_visuals(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is not None and len(_listed(given[name])) for name in ("images", "videos"))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _images_per_row(plain: Any, given: Mapping[str, Any]) -> list[int] | None:
    """How many images and videos each row has, ``(B,)``; ``None`` where the arguments do not say."""
    text = given.get("text")
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        return None
    totals = [0] * len(texts)
    for name, mark in (("images", "image_token"), ("videos", "video_token")):
        if given.get(name) is None:
            continue
        counts = _counts(given[name], texts, getattr(plain, mark, None))
        if counts is None:
            return None
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    return totals


def _counts(visuals: Any, texts: Sequence[str], mark: Any) -> list[int] | None:
    values = _listed(visuals)
    if any(isinstance(one, (list, tuple)) for one in values):
        return [len(_listed(one)) for one in values] if len(values) == len(texts) else None
    if len(texts) == 1:
        return [len(values)]
    counts = [text.count(mark) for text in texts] if isinstance(mark, str) and mark else []
    return counts if counts and sum(counts) == len(values) else None


@dataclass
class _Options:
    """What a call asks of the rows' lengths, which count once the VoCo tokens are in."""

    limit: int | None = None
    pad_to: int | None = None
    multiple: int | None = None

    def lengths(self, plain: Any, kwargs: Mapping[str, Any]) -> Lengths:
        tokenizer = tokenizer_of(plain)
        return Lengths(
            padded=_strategy(_option(kwargs, "padding")) not in (None, False, "do_not_pad"),
            padding_side=_option(kwargs, "padding_side") or getattr(tokenizer, "padding_side", "right"),
            pad_token_id=pad_id_of(plain),
            limit=self.limit,
            pad_to=self.pad_to,
            multiple=self.multiple,
        )


def _strategy(value: Any) -> Any:
    return getattr(value, "value", value)  # transformers takes its enumerations too


def _option(kwargs: Mapping[str, Any], name: str) -> Any:
    """An option of the text, given as it is or within ``text_kwargs``."""
    nested = kwargs.get("text_kwargs") or {}
    common = kwargs.get("common_kwargs") or {}
    return next((where[name] for where in (kwargs, nested, common) if name in where), None)


def _without_lengths(plain: Any, kwargs: dict[str, Any]) -> tuple[_Options, dict[str, Any]]:
    """The options of length taken out of ``kwargs``: the tokenizer would count without the VoCo tokens, and
    cut through images.
    """
    tokenizer = tokenizer_of(plain)
    length, padding = _option(kwargs, "max_length"), _strategy(_option(kwargs, "padding"))
    cut = _strategy(_option(kwargs, "truncation"))
    if cut is None and length is not None and padding in (None, False):
        cut = True  # as tokenizers take it
    length = length if length is not None else getattr(tokenizer, "model_max_length", None)
    known = int(length) if length is not None and length < _NO_LIMIT else None
    limit = known if cut not in (None, False, "do_not_truncate") else None
    if limit is not None and getattr(tokenizer, "truncation_side", "right") == "left":
        raise ValueError(
            "truncation with truncation_side='left' would cut the images off; set "
            "tokenizer.truncation_side='right', or leave truncation out."
        )
    if _option(kwargs, "return_overflowing_tokens"):
        raise ValueError("return_overflowing_tokens makes rows without their images; leave it out.")
    options = _Options(
        limit, known if padding == "max_length" else None, _option(kwargs, "pad_to_multiple_of")
    )
    kwargs = _stripped(kwargs, padding)
    for name in ("text_kwargs", "common_kwargs"):
        if kwargs.get(name):
            kwargs[name] = _stripped(kwargs[name], padding)
    return options, kwargs


def _stripped(values: Mapping[str, Any], padding: Any) -> dict[str, Any]:
    names = ("max_length", "truncation", "pad_to_multiple_of")
    kept = {name: value for name, value in values.items() if name not in names}
    if "padding" in kept and padding == "max_length":
        kept["padding"] = True
    return kept
