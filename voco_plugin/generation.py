"""``VoCoGenerationMixin``: compress once, answer any number of prompts (paper, Sec. 3.3, Fig. 4)."""

from __future__ import annotations

from typing import Any

import torch

from .cache import VoCoCache
from .cache.groups import Limits
from .cache.stage_one import compress
from .cache.stage_two import Placed, place
from .cache_state import CacheState
from .injection import insert_voco_tokens
from .isolation import Attachment
from .layout import SequenceLayout


class VoCoGenerationMixin:
    """The methods that ``attach`` gives a model. It stands before the model's own class in the method
    order.
    """

    _voco_attachment: Attachment

    # -- stage 1
    # -------------------------------------------------------------------------------------------------

    def insert_voco_tokens(self, inputs: dict[str, Any], num_tokens: int | None = None) -> dict[str, Any]:
        """A processor's output with K VoCo tokens after every image (and the block sinks, where the rule has
        them).

        Args:
            inputs: ``input_ids`` ``(B, N)``, ``attention_mask`` and the processor's other tensors.
            num_tokens: K; by default the config's.
        """
        state = self._voco_attachment
        mask = inputs.get("attention_mask")
        left = mask is not None and bool((mask[:, 0] == 0).any())
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        return insert_voco_tokens(
            dict(inputs),
            state.vocab,
            num_tokens or state.config.num_tokens,
            pad_token_id=pad if isinstance(pad, int) and pad >= 0 else 0,
            padding_side="left" if left else "right",
        )

    @torch.no_grad()
    def compress(
        self,
        num_tokens: int | None = None,
        max_memory: int | None = None,
        max_batch_tokens: int | None = None,
        **inputs: Any,
    ) -> VoCoCache:
        """Stage 1: the keys and values of every block's VoCo tokens. Blocks of one length share a forward.

        Args:
            num_tokens: the K each block gets, whatever number the inputs hold (elastic K, paper, Table 4);
                ``None`` takes what they hold.
            max_memory: bytes that one forward may take on top of the weights, as estimated from the config
                (``cache/memory.py``); blocks run in chunks that fit. ``None``: no limit.
            max_batch_tokens: vision and VoCo tokens that one forward may hold.
            inputs: what the model's forward takes: ``input_ids`` ``(B, N)`` with vision and VoCo tokens,
                ``attention_mask``, pixels.

        Returns:
            one :class:`~voco_plugin.cache.VoCoBlock` per block, in order, each with its batch row. Text
            around the images changes nothing under ``block_context="self"``.

        Raises:
            LayoutError: the ids do not form blocks.
            ValueError: the rule does not isolate, or a limit is below what one block (or the images that
                cannot be told apart) takes.
        """
        return compress(self, self._voco_attachment, inputs, num_tokens, Limits(max_memory, max_batch_tokens))

    def stream_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The compressed stream of ``inputs``: ``input_ids`` and ``attention_mask`` (and a prefix-LM's
        ``token_type_ids``) without the vision tokens, left-padded.
        """
        state = self._voco_attachment
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        layout = SequenceLayout.from_ids(ids, mask, state.vocab)
        keep = layout.in_stream.to(ids.device)
        longest = int(keep.sum(dim=1).max())
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        stream = ids.new_full((ids.shape[0], longest), pad if isinstance(pad, int) and pad >= 0 else 0)
        stream_mask = torch.zeros_like(stream)
        types = inputs.get("token_type_ids") if state.family.prefix_lm else None
        stream_types = None if types is None else torch.zeros_like(stream)
        for row in range(ids.shape[0]):
            kept = ids[row, keep[row]]
            stream[row, longest - len(kept) :] = kept
            stream_mask[row, longest - len(kept) :] = 1
            if types is not None:
                stream_types[row, longest - len(kept) :] = types[row, keep[row]]
        out = {"input_ids": stream, "attention_mask": stream_mask}
        return out if types is None else {**out, "token_type_ids": stream_types}

    # -- stage 2
    # -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, voco_cache: VoCoCache | None = None, **kwargs: Any) -> Any:
        """The model's own forward; with ``voco_cache``, stage 2.

        Args:
            voco_cache: the compressed images. ``input_ids`` ``(B, S)`` is then the stream, text and VoCo
                tokens; the VoCo runs say where each block goes.

        Returns:
            the model's own output. With ``voco_cache``, ``logits`` has a row per stream token, ``(B, S,
            vocabulary)``; those of VoCo tokens and padding are NaN: they were computed in stage 1, or never.
        """
        if voco_cache is None:
            return super().forward(*args, **kwargs)
        return self._stage_two(voco_cache, *args, **kwargs)

    def _stage_two(
        self, cache: VoCoCache, input_ids: torch.Tensor, attention_mask=None, **kwargs: Any
    ) -> Any:
        for name in ("past_key_values", "inputs_embeds", "position_ids"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be given together with voco_cache, which decides it; leave it out."
                )
        labels, keep = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
        return_dict = kwargs.pop("return_dict", None)
        types = kwargs.pop("token_type_ids", None)
        placed = place(self, self._voco_attachment, input_ids, attention_mask, cache, types)
        if types is not None:
            kwargs["token_type_ids"] = types.gather(1, placed.columns.clamp_min(0))
        state = self._voco_attachment
        hooked_here = state.family.backbone(self) is self
        run = self.__call__ if hooked_here else super().forward
        with state.positions("own"):
            output = run(
                input_ids=placed.input_ids,
                attention_mask=placed.attention_mask,
                past_key_values=placed.past_key_values,
                use_cache=True,
                **{
                    k: v
                    for k, v in kwargs.items()
                    if k not in ("use_cache", "position_ids", "past_key_values")
                },
            )
        logits = output.logits
        full = logits.new_full((*input_ids.shape, logits.shape[-1]), float("nan"))
        row, column = (placed.columns >= 0).nonzero(as_tuple=True)
        full = full.index_put((row, placed.columns[row, column]), logits[row, column])
        if labels is not None:
            output["loss"] = self.loss_function(logits=full, labels=labels, vocab_size=full.shape[-1])
        output["logits"] = full[:, -keep:] if isinstance(keep, int) and keep else full
        return output if return_dict is not False else output.to_tuple()

    # -- both
    # ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        voco_cache: VoCoCache | None = None,
        two_stage: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Generate, with everything transformers' ``generate`` takes.

        Args:
            voco_cache: answer from these blocks; ``input_ids`` is the stream. The cache is not changed.
            two_stage: without ``voco_cache`` and with images: compress first, then answer from the blocks.
                ``False`` keeps the vision tokens' keys in memory and masks them (the reference; the same
                tokens).

        Returns:
            as ``generate``: the given ``input_ids`` followed by the new tokens.
        """
        if inputs is not None and kwargs.get("input_ids") is None:
            kwargs["input_ids"] = inputs
        ids = kwargs.get("input_ids")
        state = self._voco_attachment
        if voco_cache is None:
            if ids is None or not state.config.isolates:
                return super().generate(*args, **kwargs)
            past = kwargs.get("past_key_values")
            layout = SequenceLayout.from_ids(ids, _mask_of(kwargs, ids), state.vocab)
            if not layout.spans or past is not None or not two_stage:
                if layout.spans or CacheState.of(past) is not None:
                    _refuse_static(kwargs, args)
                    self._suppress(kwargs, args)
                with state.positions("own"):
                    return super().generate(*args, **kwargs)
            vision = {k: v for k, v in kwargs.items() if _is_model_input(k, v)}
            voco_cache = self.compress(**vision)
            stream = self.stream_inputs(vision)
            rest = {k: v for k, v in kwargs.items() if k not in vision}
            return self._generate_from(voco_cache, stream, ids, args, rest)
        if ids is None:
            raise ValueError("generate(voco_cache=…) needs input_ids: the stream of text and VoCo tokens.")
        stream = {"input_ids": ids, "attention_mask": _mask_of(kwargs, ids)}
        rest = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
        return self._generate_from(voco_cache, stream, ids, args, rest)

    def _generate_from(self, cache, stream, shown: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        """Stock ``generate`` on the placed blocks; the output starts with the ids the caller gave."""
        _refuse_static(kwargs, args)
        if len(cache):
            self._suppress(kwargs, args)
        types = stream.get("token_type_ids", kwargs.pop("token_type_ids", None))
        placed = place(
            self, self._voco_attachment, stream["input_ids"], stream["attention_mask"], cache, types
        )
        if types is not None:
            kwargs["token_type_ids"] = types.gather(1, placed.columns.clamp_min(0))
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] = kwargs["max_length"] - shown.shape[1] + placed.input_ids.shape[1]
        times = _expansion(self, args, kwargs)
        if times > 1 and placed.past_key_values.get_seq_length():
            placed.past_key_values.batch_repeat_interleave(times)
        with self._voco_attachment.positions("own"):
            output = super().generate(
                *args,
                input_ids=placed.input_ids,
                attention_mask=placed.attention_mask,
                past_key_values=placed.past_key_values,
                **kwargs,
            )
        return _with_prompt(output, shown, placed)

    def _suppress(self, kwargs: dict, args: tuple) -> None:
        """VoCo and image tokens are input only: after images they are never generated."""
        vocab = self._voco_attachment.vocab
        listed = _setting(self, args, kwargs, "suppress_tokens", [])
        kwargs["suppress_tokens"] = sorted({*listed, vocab.voco_id, *vocab.placeholders})

    # -- saving
    # --------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """An ordinary transformers checkpoint, ``voco_config.json`` and, where one was given, the
        processor.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            state = self._voco_attachment
            state.save(save_directory)
            if state.processor is not None:
                state.processor.save_pretrained(save_directory)


_GENERATION_ONLY = {
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "suppress_tokens",
    "past_key_values",
    "tokenizer",
}


def _is_model_input(name: str, value: Any) -> bool:
    if name in _GENERATION_ONLY:
        return False
    tensors = isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, torch.Tensor) for v in value)
    )
    return tensors or name in ("mm_encoder_outputs", "vision_feature_layer", "vision_feature_select_strategy")


def _mask_of(kwargs: dict, ids: torch.Tensor) -> torch.Tensor:
    mask = kwargs.get("attention_mask")
    past = kwargs.get("past_key_values")
    if mask is None:
        return torch.ones_like(ids)
    return mask[:, -ids.shape[1] :] if past is not None else mask


def _setting(model: Any, args: tuple, kwargs: dict, name: str, default: Any) -> Any:
    config = (
        kwargs.get("generation_config")
        or (args[0] if args else None)
        or getattr(model, "generation_config", None)
    )
    value = kwargs.get(name)
    if value is None:
        value = getattr(config, name, None)
    return default if value is None else value


def _expansion(model: Any, args: tuple, kwargs: dict) -> int:
    """How often ``generate`` repeats each row."""
    beams = _setting(model, args, kwargs, "num_beams", 1)
    returned = _setting(model, args, kwargs, "num_return_sequences", 1)
    return max(beams, returned)


def _refuse_static(kwargs: dict, args: tuple) -> None:
    kind = _setting(None, args, kwargs, "cache_implementation", None)
    if kind is not None and kind not in ("dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={kind!r} builds its masks outside the model, where the isolation rule is "
            "not seen; leave it out."
        )


def _with_prompt(output: Any, shown: torch.Tensor, placed: Placed) -> Any:
    """The caller's ids in place of the placed text tokens at the head of the generated sequences."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    new = sequences[:, placed.input_ids.shape[1] :]
    times = sequences.shape[0] // shown.shape[0]
    joined = torch.cat([shown.repeat_interleave(times, dim=0).to(new.device), new], dim=1)
    if isinstance(output, torch.Tensor):
        return joined
    output.sequences = joined
    return output


__all__ = ["VoCoGenerationMixin"]
