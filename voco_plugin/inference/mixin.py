"""``VoCoGenerationMixin``: compress once, answer any number of prompts (paper, Sec. 3.3, Fig. 4)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .._compat import cache_names, chunks_forget_the_cache
from ..cache import VoCoCache
from ..cache.compress.batching import Limits
from ..cache.compress.stage_one import compress
from ..cache.place.stage_two import place
from ..core.adapter_stages import check_model
from ..core.attachment import Attachment
from ..core.attention import backend_for, register
from ..core.extension import Extension
from ..core.forward import (
    ONE_PASS,
    OWN_POSITIONS,
    ForwardMode,
    as_cache,
    cache_of,
    given_cache,
    handing,
    run_forward,
)
from ..core.injection import insert_voco_tokens
from ..core.kv_cache import KVSlots
from ..core.layout import SequenceLayout, pad_id_of_model, padding_side_of, tokenizer_of
from .generate_from_blocks import (
    by_name,
    change,
    check_draft,
    expansion,
    head_start,
    is_assisted,
    only_new,
    own_config,
    prefill_chunk,
    read_placed,
    refuse_in_one_pass,
    refuse_settings,
    setting,
    shift_lengths,
    static_kind,
    to_static,
    with_prompt,
    without_rope_deltas,
)
from .modeling_file import write_modeling_file
from .saved_note import note_rule
from .shown_prompt import Prompt, PromptedProcessors, show_prompt


class VoCoGenerationMixin(Extension):
    """The methods that ``attach`` gives a model. It stands before the model's own class in the method
    order.
    """

    _voco_attachment: Attachment

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a process that never attached a model has no name for the attention of an unpickled one
        super().__setstate__(state)  # type: ignore[misc]

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """A ``forward`` with the signature of ``base``, the model's own class, and ``voco_cache``: generate
        and Trainer read the names of arguments off it.
        """
        own = inspect.signature(base.forward)  # type: ignore[attr-defined]
        extra = inspect.Parameter("voco_cache", inspect.Parameter.KEYWORD_ONLY, default=None)
        at = sum(p.kind is not inspect.Parameter.VAR_KEYWORD for p in own.parameters.values())
        parameters = list(own.parameters.values())

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return VoCoGenerationMixin.forward(self, *args, **kwargs)

        forward.__signature__ = own.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # type: ignore
        forward.__doc__ = base.forward.__doc__  # type: ignore[attr-defined]
        return {"forward": forward}

    # -- stage 1
    # -------------------------------------------------------------------------------------------------

    def insert_voco_tokens(
        self,
        inputs: dict[str, Any],
        num_tokens: int | None = None,
        padding_side: str | None = None,
        images_per_row: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A processor's output with K VoCo tokens after every image (and the block sinks, where the rule has
        them).

        Args:
            inputs: ``input_ids`` ``(B, N)``, ``attention_mask`` and the processor's other tensors.
            num_tokens: K; by default the config's.
            padding_side: where rows that are then shorter than others are padded; ``None`` takes the side
                that ``attention_mask`` shows, and where it shows none, the processor's.
            images_per_row: how many images each row holds, ``(B,)``: needed for several rows with images side
                by side where the backbone writes no marker between them (LLaVA).

        Raises:
            LayoutError: images side by side cannot be told apart.
            ValueError: rows of one length come out of different lengths, and nothing says on which side to
                pad (no processor was given to ``attach``).
        """
        state = self._voco_attachment
        mask = inputs.get("attention_mask")
        side = padding_side or padding_side_of(mask)
        if side is None and state.processor is not None:
            side = getattr(tokenizer_of(state.processor), "padding_side", None)
        made = insert_voco_tokens(
            dict(inputs),
            state.vocab,
            num_tokens or state.config.num_tokens,
            pad_token_id=pad_id_of_model(self),
            padding_side=side or "right",
            images_per_row=images_per_row,
        )
        if side is None and not made["attention_mask"].bool().all():
            raise ValueError(
                "insert_voco_tokens: the rows were of one length and are no more, and nothing says on which "
                "side to pad them; give padding_side='left' (for generation) or 'right' (for training)."
            )
        return made

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
        check_model(self, self._voco_attachment.config.adapter_stages)
        limited = max_memory is not None or max_batch_tokens is not None
        limits = Limits(max_memory, max_batch_tokens) if limited else None
        return compress(self, self._voco_attachment, inputs, num_tokens, limits)

    def stream_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The compressed stream of ``inputs``: ``input_ids`` and ``attention_mask`` (and a prefix-LM's
        ``token_type_ids``) without the vision tokens, left-padded.
        """
        state = self._voco_attachment
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        layout = SequenceLayout.from_ids(ids, mask, state.vocab)
        keep = layout.in_stream.to(ids.device)
        longest = int(keep.sum(dim=1).max())
        stream = ids.new_full((ids.shape[0], longest), pad_id_of_model(self))
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

    @torch.no_grad()
    def prefix_cache(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        voco_cache: VoCoCache | None = None,
        prefix_cache: Cache | None = None,
    ) -> DynamicCache:
        """The keys and values of what many prompts begin with (a system prompt, or a conversation so far),
        read once. ``forward`` and ``generate`` take it as ``prefix_cache``, with any blocks after it.

        Args:
            input_ids: ``(B, S)``, its stream; ``B`` is 1 where the prompts share it.
            attention_mask: ``(B, S)``.
            voco_cache: the blocks of its VoCo tokens, if it has any.
            prefix_cache: what stands before it, if anything does; it is not changed.

        Returns:
            a transformers ``DynamicCache`` that remembers its rows' positions and what made it.
        """
        output = self._stage_two(
            VoCoCache() if voco_cache is None else voco_cache, input_ids, attention_mask,
            prefix_cache=prefix_cache, logits_to_keep=1,
        )  # fmt: skip
        return cache_of(output)

    def forward(
        self,
        *args: Any,
        voco_cache: VoCoCache | None = None,
        prefix_cache: Cache | None = None,
        training_step: Any = None,
        voco_mode: ForwardMode | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward; with ``voco_cache``, stage 2.

        Args:
            voco_cache: the compressed images. ``input_ids`` ``(B, S)`` is then the stream, text and VoCo
                tokens; the VoCo runs say where each block goes.
            prefix_cache: what the stream goes on from (:meth:`prefix_cache`); it is not changed.
            training_step: what a trainer adds to the forward of one batch (a fused loss, two stages, a
                distillation): ``training_step.run(model, **batch)`` gives the output. A batch that
                asks for no fused head (a loss function of the user's) is one pass.
            voco_mode: how this forward is run (:class:`~voco_plugin.core.forward.ForwardMode`).

        Returns:
            the model's own output. With ``voco_cache``, ``logits`` has a row per stream token, ``(B, S,
            vocabulary)``; those of VoCo tokens and padding are NaN: they were computed in stage 1, or never.
        """
        check_model(self, self._voco_attachment.config.adapter_stages)
        if training_step is not None and kwargs.get("fused_lm_head"):
            return training_step.run(self, **kwargs)
        if voco_cache is None and prefix_cache is None:
            return self._read(voco_mode, *args, **kwargs)
        voco_cache = VoCoCache() if voco_cache is None else voco_cache
        return self._stage_two(voco_cache, *args, prefix_cache=prefix_cache, **kwargs)

    def _read(self, mode: ForwardMode | None, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, its backbone run in ``mode``."""
        self._voco_attachment.check_attached()
        backbone = self._voco_attachment.family.backbone(self)  # type: ignore[arg-type]
        if backbone is self:  # Llama 4
            return run_forward(self._voco_attachment, self, super().forward, args, kwargs, mode)  # type: ignore
        if mode is None or mode is ONE_PASS:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with handing(backbone, mode):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _stage_two(
        self,
        voco_cache: VoCoCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prefix_cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        decided = (*cache_names(), *DECIDED)
        _refuse(kwargs, decided)
        labels, keep = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
        return_dict = kwargs.pop("return_dict", None)
        types = kwargs.pop("token_type_ids", None)
        placed = place(
            self, self._voco_attachment, input_ids, attention_mask, voco_cache, types, prefix_cache
        )
        if types is not None:
            kwargs["token_type_ids"] = types.gather(1, placed.columns.clamp_min(0))
        if isinstance(keep, int) and keep == 1 and labels is None and placed.whole_last_column:
            kwargs["logits_to_keep"] = 1  # the head on one token only
        more = {k: v for k, v in kwargs.items() if k != "use_cache" and k not in decided}
        # what a caller asks of every token, or of the inside, needs the prompt at once
        chunk = prefill_chunk(placed) if set(more) <= {"logits_to_keep"} and more else None
        with without_rope_deltas(self):
            output = read_placed(self._read, placed, chunk, **more)
        logits = output.logits
        if logits.shape[1] == 1 and kwargs.get("logits_to_keep"):
            return output if return_dict is not False else output.to_tuple()
        full = logits.new_full((*input_ids.shape, logits.shape[-1]), float("nan"))
        row, at, column = placed.text.to(logits.device)
        full = full.index_put((row, column), logits[row, at])
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
            inputs: as transformers has it; ``input_ids`` by name does as well.
            voco_cache: answer from these blocks; ``input_ids`` is the stream. The cache is not changed.
                ``prefix_cache`` (see :meth:`prefix_cache`) stands before it.
                ``cache_implementation="static"`` decodes on a static cache (compiled where transformers
                compiles).
            two_stage: without ``voco_cache`` and with images: compress first, then answer from the blocks.
                ``False`` keeps the vision tokens' keys in memory and masks them (the reference; the same
                tokens), as does a compressor that reads the question.

        Returns:
            as ``generate``: the given ``input_ids`` followed by the new tokens.
        """
        args, kwargs = (), {**by_name(args, kwargs), **kwargs}
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("generate: the prompt is given twice, as inputs and as input_ids; give one.")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        ids = kwargs.get("input_ids")
        state = self._voco_attachment
        prefix = kwargs.pop("prefix_cache", None)
        if voco_cache is None and prefix is None and (ids is None or state.config.rule == "causal"):
            return super().generate(*args, **kwargs)
        if ids is None:
            raise ValueError("generate(voco_cache=…) needs input_ids: the stream of text and VoCo tokens.")
        if voco_cache is None:
            past = given_cache(kwargs)
            layout = SequenceLayout.from_ids(ids, _mask_of(kwargs, ids), state.vocab)
            asks_first = state.embeddings is not None and state.embeddings.compressor.reads_question
            if prefix is None and (not layout.spans or past is not None or not two_stage or asks_first):
                if layout.spans or KVSlots.of(past) is not None:
                    _refuse(kwargs, DECIDED, "the isolation rule")
                    refuse_in_one_pass(self, args, kwargs)
                    _refuse_right_padding(kwargs.get("attention_mask"))
                    args = own_config(args, kwargs)
                    self._suppress(args, kwargs)
                return super().generate(*args, **kwargs)
            if layout.spans:
                _refuse(kwargs, (*cache_names(), *DECIDED), "the isolation rule")
                vision = {k: v for k, v in kwargs.items() if _is_model_input(k, v)}
                self._validate_model_kwargs(dict(vision))  # type: ignore[attr-defined]
                stream = self.stream_inputs(vision)
                rest = {k: v for k, v in kwargs.items() if k not in vision}
                shown = {"input_ids": ids, "attention_mask": _mask_of(kwargs, ids)}
                return self._generate_from(self.compress(**vision), stream, shown, args, rest, prefix)
            voco_cache = VoCoCache()
        stream = {"input_ids": ids, "attention_mask": _mask_of(kwargs, ids)}
        rest = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
        return self._generate_from(voco_cache, stream, stream, args, rest, prefix)

    def _generate_from(
        self, cache: VoCoCache, stream: dict, given: dict, args: tuple, kwargs: dict, prefix: Any
    ) -> Any:
        """Stock ``generate`` on the placed blocks; the output starts with the ids the caller gave."""
        _refuse(kwargs, (*cache_names(), *DECIDED))
        refuse_settings(self, args, kwargs)
        args = own_config(args, kwargs)
        state = self._voco_attachment
        static, assisted = static_kind(self, args, kwargs), is_assisted(self, args, kwargs)
        if assisted:
            check_draft(self, kwargs)
        if len(cache) or prefix is not None:
            self._suppress(args, kwargs)
        types = stream.get("token_type_ids", kwargs.pop("token_type_ids", None))
        placed = place(self, state, stream["input_ids"], stream["attention_mask"], cache, types, prefix)
        if not placed.ends_with_text:
            raise ValueError(
                "a prompt ends with an image, and its answer would follow from a VoCo token that was read in "
                "stage 1; put text after the image, or use generate(…, two_stage=False)."
            )
        if types is not None:
            types = types.gather(1, placed.columns.clamp_min(0))
        times = expansion(self, args, kwargs)
        cut = setting(self, args, kwargs, "prefill_chunk_size")
        cut_here = chunks_forget_the_cache() and (cut or prefill_chunk(placed)) is not None
        if static is not None or assisted or cut_here:
            with without_rope_deltas(self):
                start = head_start(self, state, placed, types, self._read, cut)
            if cut is not None:  # its last token is left
                change(args, kwargs, prefill_chunk_size=None)
                if self.generation_config.prefill_chunk_size is not None:  # it would be filled in
                    kwargs["prefill_chunk_size"] = None
        else:
            start = {
                "input_ids": placed.input_ids,
                "attention_mask": placed.attention_mask,
                **as_cache(placed.past),
            }
            if types is not None:
                kwargs["token_type_ids"] = types
            chunk = prefill_chunk(placed)
            if chunk is not None and setting(self, args, kwargs, "prefill_chunk_size") is None:
                change(args, kwargs, prefill_chunk_size=chunk)
        shown, length = given["input_ids"], start["input_ids"].shape[1]
        show_prompt(kwargs, Prompt(shown, given["attention_mask"], length))
        shift_lengths(self, args, kwargs, length - shown.shape[1])
        if times > 1 and given_cache(start).get_seq_length():
            given_cache(start).batch_repeat_interleave(times)
        # the blocks are in a KV cache, whatever a config saved in training says of caches
        change(args, kwargs, use_cache=True, cache_implementation=None)
        if self.generation_config.cache_implementation is not None:  # it would be filled in
            kwargs["cache_implementation"] = None
        if static is not None:
            most = setting(self, args, kwargs, "max_new_tokens")
            most = length + most if most is not None else setting(self, args, kwargs, "max_length", 0)
            most = max(most, length + 1, setting(self, args, kwargs, "max_cache_len", 0))
            kwargs.pop("max_cache_len", None)
            start = to_static(self, state, start, placed.position_ids[:, -1], most)
        with without_rope_deltas(self):
            output = super().generate(*args, **start, **kwargs)
        return with_prompt(output, shown, length)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; those of ``input_ids`` that stand for cached slots are left out."""
        if kwargs.get("next_sequence_length") is None:
            kwargs["next_sequence_length"] = only_new(given_cache(kwargs), input_ids)
        found = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        return {**found, "voco_mode": OWN_POSITIONS}  # positions that generate counts are not the rule's

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("logits_processor")
        if isinstance(given, PromptedProcessors):
            return given.built(super()._get_logits_processor, generation_config, kwargs)  # type: ignore[misc]
        return super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As the model's own; the language model gets the backend that keeps the rule on
        ``attn_implementation``.

        Raises:
            ValueError: an implementation that cannot honour the rule; nothing has changed then.
        """
        state = self._voco_attachment
        text = state.family.text_model(self).config  # type: ignore[arg-type]
        configs = {id(m.config): m.config for m in self.modules() if hasattr(m, "config")}  # type: ignore
        before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
        try:
            text._attn_implementation_internal = state.restore["implementation"]
            super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
            wanted = text._attn_implementation
            text._attn_implementation_internal = backend_for(wanted, state.config.attention)
            state.restore["implementation"] = wanted
        except BaseException:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            raise

    def _suppress(self, args: tuple, kwargs: dict) -> None:
        """VoCo and image tokens are input only: after images they are never generated."""
        vocab = self._voco_attachment.vocab
        listed = setting(self, args, kwargs, "suppress_tokens", [])
        change(args, kwargs, suppress_tokens=sorted({*listed, vocab.voco_id, *vocab.placeholders}))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and so are ``generate_batch`` and the context manager, which begin with it.

        Raises:
            ValueError: requests share a row there, where nothing keeps one from reading another's image.
        """
        raise ValueError(
            "transformers' continuous batching packs requests into one row, where the isolation rule is not "
            "applied; batch the prompts with generate(voco_cache=VoCoCache.stack(…))."
        )

    # -- saving
    # --------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """An ordinary transformers checkpoint in ``save_directory``, ``voco_config.json`` and, where one was
        given, the processor; with a card, where the folder has none, that says how it is loaded, and the file
        by which ``from_pretrained(…, trust_remote_code=True)`` finds the rule.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            state = self._voco_attachment
            state.save(save_directory)
            if state.processor is not None:
                state.processor.save_pretrained(save_directory)
            note_rule(save_directory, state.config, write_modeling_file(save_directory, self))


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
    *cache_names(),
    "prefix_cache",
    "tokenizer",
}


DECIDED = ("inputs_embeds", "position_ids")


def _refuse(kwargs: dict, names: tuple[str, ...], by: str = "voco_cache") -> None:
    """Refuse what the blocks decide."""
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} cannot be given together with {by}, which decides it; leave it out.")


def _refuse_right_padding(mask: Any) -> None:
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError(
            "the prompts are padded on the right, so that the next token would follow padding; pad on the "
            "left (processor(…, padding_side='left'), insert_voco_tokens(…, padding_side='left'))."
        )


def _is_model_input(name: str, value: Any) -> bool:
    if name in _GENERATION_ONLY:
        return False
    tensors = isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, torch.Tensor) for v in value)
    )
    return tensors or name in ("mm_encoder_outputs", "vision_feature_layer", "vision_feature_select_strategy")


def _mask_of(kwargs: dict, ids: torch.Tensor) -> torch.Tensor:
    mask = kwargs.get("attention_mask")
    past = given_cache(kwargs)
    if mask is None:
        return torch.ones_like(ids)
    return mask[:, -ids.shape[1] :] if past is not None else mask


__all__ = ["VoCoGenerationMixin"]
