"""``VoCoConfig``: what is compressed, under which rule, and at which positions."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .files import atomic_write_text

T = TypeVar("T")

CONFIG_NAME = "voco_config.json"
VOCO = "voco"
"""The compressor that is the language model itself: VoCo tokens read the vision tokens (the paper's)."""
FORMAT_VERSION = 1

RULES = ("isolated", "causal", "star")
BLOCK_CONTEXTS = ("self", "prefix")
POSITIONS = ("compact", "sequential")
BLOCK_SINKS = ("none", "bos")
ATTENTIONS = ("auto", "dense", "segmented", "flex", "flash")
ADAPTER_STAGES = ("both", "compress", "separate")
TOKEN_INITS = ("learned", "slots", "pooled", "queries")
_LISTED = 30


def nearest(name: str, known: Any) -> str:
    """`` (did you mean 'x'?)`` for a mistyped ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def suggest_fields(kind: type[T]) -> type[T]:
    """For a dataclass: an unknown argument of its constructor is an error that gives the nearest name."""
    plain = kind.__init__  # type: ignore[misc]
    known = list(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in known:
                all_of_them = f"; it has {', '.join(known)}" if len(known) <= _LISTED else ""
                raise TypeError(f"{kind.__name__} has no field {key!r}{nearest(key, known)}{all_of_them}.")
        plain(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


@suggest_fields
@dataclass
class VoCoConfig:
    """The isolation rule and its options (paper, Sec. 3.2 and 3.3).

    Args:
        num_tokens: K, the number of VoCo tokens after each vision block, at least 1.
        rule: ``isolated`` (text reads VoCo tokens, never vision tokens), ``causal`` (no isolation: the
            paper's upper bound) or ``star`` (isolated, and a vision token sees only itself).
        block_context: what a block sees of the stream before it. ``self``: nothing, so that stage 1 is
            ``[V, C]`` alone (Sec. 3.3) and a cached block can be reused in any prompt. ``prefix``: the text
            and VoCo tokens before it (Eq. 3 to the letter).
        positions: ``compact`` numbers the stream as if the vision tokens were not there; ``sequential``
            counts as the backbone does. ``None`` takes ``compact`` where the rule allows it (an isolating
            rule with ``block_context="self"``), else ``sequential``.
        attention: how the rule is computed, on the backbone's own eager or sdpa kernel: ``dense`` (one N × N
            mask), ``segmented`` (what the rule hides is never computed), ``flex`` (FlexAttention), ``flash``
            (FlashAttention, on a GPU), ``auto`` (of the first two, forward by forward). All give the same.
        block_sink: ``bos`` starts each block with its own copy of the BOS token, which counts as a vision
            token.
        hide_prefix: the official code's mask: text after a block does not see what came before the first
            VoCo token (the system prompt included).
        token_init: how the VoCo tokens' input embeddings are made. ``learned``: one trained row (the
            paper's). ``slots``: a trained offset for each of the K slots on top of it. ``pooled``: the row
            plus a linear map of the mean image feature of K regions, at zero when training starts or, with
            the option ``start: identity``, at the identity.
            ``queries``: the row plus such a map of what K learned queries read off the image, place by
            place. What else happens is unchanged, and so is what the cache can be used for.
        compressor: ``voco``, or a rival of the registry of compressors, whose K embeddings of the image stand
            where the VoCo tokens stand: the rule then hides the vision tokens from these too.
        compressor_options: what the rival takes, by name, or ``token_init="queries"`` or ``"pooled"``.
        frozen_stage1: the model compresses without its adapter and reads with it, as ``stage1: frozen``
            trained it. A fact of a checkpoint, which the trainer writes; nothing to choose.
        adapter_stages: which tokens LoRA acts on. ``both``: all. ``compress``: those of images (vision and
            VoCo tokens) alone; text is read with the untouched base, in two stages and in one pass alike.
            ``separate``: two adapters, ``compress`` for images and ``read`` for text.
        token: the text of the VoCo token.
        token_id: its id; ``None`` until a model is attached, or given where there is no tokenizer to ask.
        token_seed: seed of the new embedding rows.

    Raises:
        ValueError: a value is unknown, or two options contradict each other.
    """

    num_tokens: int = 1
    rule: str = "isolated"
    block_context: str = "self"
    positions: str | None = None
    attention: str = "auto"
    block_sink: str = "none"
    hide_prefix: bool = False
    token_init: str = "learned"
    compressor: str = VOCO
    compressor_options: dict[str, Any] = field(default_factory=dict)
    frozen_stage1: bool = False
    adapter_stages: str = "both"
    token: str = "<voco>"
    token_id: int | None = None
    token_seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rule", RULES),
            ("block_context", BLOCK_CONTEXTS),
            ("attention", ATTENTIONS),
            ("block_sink", BLOCK_SINKS),
            ("token_init", TOKEN_INITS),
            ("adapter_stages", ADAPTER_STAGES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"VoCoConfig.{name}={value!r} is not known{nearest(value, allowed)}; "
                    f"use one of {', '.join(allowed)}."
                )
        for name in ("num_tokens", "token_seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"VoCoConfig.{name}={value!r} must be an integer.")
        if self.num_tokens < 1:
            raise ValueError(f"VoCoConfig.num_tokens={self.num_tokens} must be at least 1.")
        for name in ("hide_prefix", "frozen_stage1"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"VoCoConfig.{name}={getattr(self, name)!r} must be true or false.")
        if not isinstance(self.token, str) or not self.token.strip():
            raise ValueError(f"VoCoConfig.token={self.token!r} must be a non-empty string.")
        self._check_compressor()
        self._check_frozen()
        if self.positions is None:
            self.positions = "compact" if self.relocatable_rule else "sequential"
        if self.positions not in POSITIONS:
            raise ValueError(
                f"VoCoConfig.positions={self.positions!r} is not known{nearest(self.positions, POSITIONS)}; "
                f"use one of {', '.join(POSITIONS)}."
            )
        if self.positions == "compact" and not self.relocatable_rule:
            why = (
                "rule='causal' lets text read vision tokens"
                if self.rule == "causal"
                else "block_context='prefix'"
            )
            raise ValueError(
                "VoCoConfig.positions='compact' places vision and text tokens on the same positions, which "
                f"{why} does not allow; use positions='sequential', or rule='isolated' with "
                "block_context='self'."
            )

    def _check_compressor(self) -> None:
        if not isinstance(self.compressor, str) or not self.compressor:
            raise ValueError(f"VoCoConfig.compressor={self.compressor!r} must be a name.")
        self.compressor_options = {} if self.compressor_options is None else self.compressor_options
        if not isinstance(self.compressor_options, dict):
            raise ValueError(f"VoCoConfig.compressor_options={self.compressor_options!r} must be a mapping.")
        if self.reads_vision and self.token_init == "learned" and self.compressor_options:
            raise ValueError(
                f"VoCoConfig.compressor_options={self.compressor_options!r} would go unused: "
                "compressor='voco' with token_init='learned' has no options; name a compressor or "
                "token_init='queries', or leave them out."
            )
        if not self.reads_vision and self.rule != "isolated":
            raise ValueError(
                f"VoCoConfig.compressor={self.compressor!r} makes its tokens outside the LLM, where "
                f"rule={self.rule!r} says nothing; use rule='isolated'."
            )
        if not self.reads_vision and self.token_init != "learned":
            raise ValueError(
                f"VoCoConfig.token_init={self.token_init!r} is about VoCo tokens, and "
                f"compressor={self.compressor!r} makes embeddings of its own; leave token_init out."
            )
        if self.rule == "causal" and self.token_init != "learned":
            raise ValueError(
                f"VoCoConfig.token_init={self.token_init!r} is about tokens that text must read the image "
                "from; with rule='causal' it reads the image itself: use token_init='learned'."
            )

    def _check_frozen(self) -> None:
        """Where two weights compress and read, blocks must be made alone."""
        for name, wanted in (("rule", "isolated"), ("block_context", "self"), ("compressor", "voco")):
            value = getattr(self, name)
            if self.frozen_stage1 and value != wanted:
                raise ValueError(
                    f"VoCoConfig.{name}={value!r} cannot be read by a model whose stage 1 is frozen "
                    f"(frozen_stage1): its blocks are computed apart, without the adapter; leave {name} out."
                )
        if self.adapter_stages == "both":
            return
        if self.frozen_stage1:
            raise ValueError(
                f"VoCoConfig.adapter_stages={self.adapter_stages!r} compresses with an adapter, and a model "
                "whose stage 1 is frozen (frozen_stage1) compresses without; leave adapter_stages out."
            )
        if self.rule == "causal":
            raise ValueError(
                f"VoCoConfig.adapter_stages={self.adapter_stages!r} tells stage 1 from stage 2, and with "
                "rule='causal' there is one stage alone; leave adapter_stages out."
            )

    @property
    def reads_vision(self) -> bool:
        """Whether VoCo tokens read the vision tokens inside the language model (false for the rivals)."""
        return self.compressor == VOCO

    @property
    def makes_embeddings(self) -> bool:
        """Whether the VoCo tokens' input embeddings are more than the token's row."""
        return self.isolates and (not self.reads_vision or self.token_init != "learned")

    @property
    def isolates(self) -> bool:
        """Whether text is kept from the vision tokens (false only for ``rule="causal"``)."""
        return self.rule != "causal"

    @property
    def relocatable_rule(self) -> bool:
        """Whether a block depends on nothing outside itself, so that its cache can be placed anywhere."""
        return self.isolates and self.block_context == "self"

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VoCoConfig:
        """The config of ``values``; an unknown key raises ``ValueError`` with the nearest known one."""
        return from_fields(cls, values)

    def save(self, folder: str | os.PathLike, **extra: Any) -> Path:
        """Write ``voco_config.json`` into ``folder``; ``extra`` holds facts of the model (vision ids and
        such).
        """
        path = Path(folder) / CONFIG_NAME
        record = {"format_version": FORMAT_VERSION, "voco": self.to_dict(), **extra}
        atomic_write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> tuple[VoCoConfig, dict[str, Any]]:
        """Read ``voco_config.json`` of ``folder``: the config and the facts that were saved with it."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {folder} was not saved by voco_plugin.")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, voco = record["format_version"], record["voco"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a VoCo config file ({error}); save the model again.") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this release reads {FORMAT_VERSION}; upgrade it."
            )
        extra = {k: v for k, v in record.items() if k not in ("format_version", "voco")}
        return cls.from_dict(voco), extra


def from_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass ``kind`` of ``values``; an unknown key raises ``ValueError`` with the nearest known one."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]  # `type[T]` cannot say "a dataclass"
    for key in values:
        if key not in known:
            raise ValueError(
                f"{kind.__name__} has no field {key!r}{nearest(key, known)}; it has {', '.join(known)}."
            )
    return kind(**values)


def read_section(value: Any, kind: Any, name: str, example: str) -> Any:
    """The section ``name`` of a recipe or of arguments as a ``kind``, a dataclass with ``from_dict``.

    Args:
        value: such an object, a dict of its fields, such a dict as JSON, or nothing: ``None``, ``"none"``,
            ``"null"`` and ``""`` are ``None``.
        example: JSON that an error shows.

    Raises:
        ValueError: it is none of these, or its fields are wrong.
    """
    if isinstance(value, str):
        if value.strip().lower() in ("", "none", "null"):
            return None
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON ({error}); write '{example}'.") from None
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a {kind.__name__}, a dict of its fields, or None.")
    return kind.from_dict(value)
