"""How each option of generation is tried: a value that is not the default, and what it needs beside it.

Two rows, with one image and with two, so that they are padded and hold different numbers of blocks. Answers
end with id 3, which is in none of them unless it is asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as hf

from harness import inputs
from tiny import processors

ROWS = [["bos", "t3", "img@1", "c2", "t4"], ["bos", "t2", "img@2", "c2", "t3", "img@3", "c2", "t2"]]
FEW = {"max_new_tokens": 8, "eos_token_id": 3, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 2.0}


@dataclasses.dataclass
class Try:
    """One option and how it is tried.

    Args:
        value: given as the option; a function of :class:`Case` makes it where it depends on the answer.
        beside: other settings of the call, which the call without the option has too; a function of the case
            as well.
        shows: whether one pass answers otherwise with it than without.
        one_row: the first row alone.
    """

    value: Any
    beside: Any = dataclasses.field(default_factory=dict)
    shows: bool = True
    one_row: bool = False


class Case:
    """A model, its prompt and what it answers."""

    def __init__(self, model: Any, one_row: bool = False) -> None:
        self.model = model
        self.batch = inputs("llava_llama", ROWS[:1] if one_row else ROWS, "left")
        self.stream = {**model.stream_inputs(self.batch), "voco_cache": model.compress(**self.batch)}
        self.tokenizer = processors.processor("llava_llama").tokenizer
        self.answer = self.new("one pass", {})

    def new(self, way: str, options: dict[str, Any]) -> torch.Tensor:
        """The new tokens, one way."""
        given = self.stream if way == "from a cache" else self.batch
        options = {**FEW, **options}
        if "new_length" in options:
            name, more = options.pop("new_length")
            options[name] = given["input_ids"].shape[1] + more
            if name == "max_length":
                options.pop("max_new_tokens")
        torch.manual_seed(0)
        two = {"two_stage": False} if way == "one pass" else {}
        made = self.model.generate(**given, **two, **options)
        sequences = made if isinstance(made, torch.Tensor) else made.sequences
        return sequences[:, given["input_ids"].shape[1] :]


def _first(case: Case) -> int:
    return int(case.answer[0, 0])


def _draft(case: Case) -> Any:
    from harness import plain

    draft = plain("llava_llama")
    draft.resize_token_embeddings(case.model.config.get_text_config().vocab_size, mean_resizing=False)
    return draft


def _always(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ones(len(ids), dtype=torch.bool)


def _echo(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.cat([input_ids, input_ids.new_full((len(input_ids), 1), 7)], dim=1)


class _Streamer(hf.generation.BaseStreamer):
    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass


class _NoTwo(hf.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids.new_tensor([2]), -float("inf"))


OTHER = torch.tensor([[50, 51], [50, 52]])
TRIES: dict[str, Try] = {
    "max_length": Try(("max_length", 3)),
    "max_new_tokens": Try(3),
    "min_length": Try(("min_length", 4), lambda c: {"eos_token_id": _first(c)}),
    "min_new_tokens": Try(4, lambda c: {"eos_token_id": _first(c)}),
    "early_stopping": Try(True, lambda c: {"num_beams": 3, "eos_token_id": int(c.answer[0, 1])}, shows=False),
    "max_time": Try(1e-9),
    "stop_strings": Try(lambda c: c.tokenizer.decode(c.answer[0, 2:3]), lambda c: {"tokenizer": c.tokenizer}),
    "do_sample": Try(True, {"top_k": 0, "temperature": 2.0}),
    "num_beams": Try(3),
    "use_mtp": Try(True),
    "use_cache": Try(False, shows=False),
    "cache_implementation": Try("static"),
    "max_cache_len": Try(64, {"cache_implementation": "static"}, shows=False),
    "temperature": Try(0.5, {"do_sample": True, "top_k": 0}),
    "top_k": Try(2, {"do_sample": True, "temperature": 2.0}),
    "top_p": Try(0.5, SAMPLED),
    "min_p": Try(0.2, SAMPLED),
    "top_h": Try(0.4, SAMPLED),
    "typical_p": Try(0.4, SAMPLED),
    "epsilon_cutoff": Try(0.02, SAMPLED),
    "eta_cutoff": Try(0.9, SAMPLED),
    "repetition_penalty": Try(5.0),
    "encoder_repetition_penalty": Try(5.0),
    "length_penalty": Try(-5.0, lambda c: {"num_beams": 3, "eos_token_id": int(c.answer[0, 1])}),
    "no_repeat_ngram_size": Try(2, {"repetition_penalty": 0.2}),
    "encoder_no_repeat_ngram_size": Try(1, {"repetition_penalty": 0.2}),
    "bad_words_ids": Try(lambda c: [[int(c.answer[0, 1])], [int(c.answer[1, 1])]]),
    "renormalize_logits": Try(True, {"num_beams": 3}, shows=False),
    "forced_eos_token_id": Try(9),
    "remove_invalid_values": Try(True, shows=False),
    "exponential_decay_length_penalty": Try((1, 3.0), {"eos_token_id": 70}),
    "suppress_tokens": Try(lambda c: [int(c.answer[0, 1])]),
    "begin_suppress_tokens": Try(lambda c: [_first(c)]),
    "sequence_bias": Try(lambda c: [[[int(c.answer[0, 1])], -50.0]]),
    "token_healing": Try(True, lambda c: {"tokenizer": c.tokenizer}),
    "guidance_scale": Try(3.0),
    "watermarking_config": Try(hf.generation.WatermarkingConfig(bias=8.0)),
    "num_return_sequences": Try(2, {"num_beams": 2}),
    "output_attentions": Try(True, {"return_dict_in_generate": True}, shows=False),
    "output_hidden_states": Try(True, {"return_dict_in_generate": True}, shows=False),
    "output_scores": Try(True, {"return_dict_in_generate": True}, shows=False),
    "output_logits": Try(True, {"return_dict_in_generate": True}, shows=False),
    "return_dict_in_generate": Try(True, shows=False),
    "pad_token_id": Try(7, lambda c: {"eos_token_id": int(c.answer[0, 1])}),
    "eos_token_id": Try(lambda c: int(c.answer[0, 1])),
    "is_assistant": Try(True),
    "num_assistant_tokens": Try(2, lambda c: {"assistant_model": _draft(c)}, shows=False, one_row=True),
    "num_assistant_tokens_schedule": Try(
        "constant", lambda c: {"assistant_model": _draft(c)}, shows=False, one_row=True
    ),
    "assistant_confidence_threshold": Try(
        0.1, lambda c: {"assistant_model": _draft(c)}, shows=False, one_row=True
    ),
    "prompt_lookup_num_tokens": Try(2, shows=False, one_row=True),
    "max_matching_ngram_size": Try(1, {"prompt_lookup_num_tokens": 2}, shows=False, one_row=True),
    "assistant_early_exit": Try(1, one_row=True),
    "assistant_ensemble_weight": Try(0.5, lambda c: {"assistant_model": _draft(c)}, one_row=True),
    "compile_config": Try(hf.CompileConfig(), {"cache_implementation": "static"}, shows=False),
    "disable_compile": Try(True, {"cache_implementation": "static"}, shows=False),
    "prefill_chunk_size": Try(2, shows=False),
    "penalty_alpha": Try(0.6, {"top_k": 4}),
    "dola_layers": Try("low"),
    "constraints": Try([1]),
    "force_words_ids": Try([[9]], {"num_beams": 3}),
    "num_beam_groups": Try(2, {"num_beams": 4, "diversity_penalty": 1.0}),
    # arguments
    "logits_processor": Try(hf.LogitsProcessorList([_NoTwo()])),
    "stopping_criteria": Try(hf.StoppingCriteriaList([_always])),
    "prefix_allowed_tokens_fn": Try(lambda c: lambda row, ids: [int(c.answer[0, 1]), int(ids[-1])]),
    "synced_gpus": Try(True),
    "assistant_model": Try(_draft, shows=False, one_row=True),
    "streamer": Try(_Streamer(), shows=False),
    "negative_prompt_ids": Try(OTHER, {"guidance_scale": 3.0}),
    "negative_prompt_attention_mask": Try(
        torch.tensor([[0, 1], [1, 1]]), {"guidance_scale": 3.0, "negative_prompt_ids": OTHER}
    ),
    "custom_generate": Try(_echo),
    "tokenizer": Try(lambda c: c.tokenizer, shows=False),
    "inputs_embeds": Try(torch.zeros(2, 30, 64)),
    "position_ids": Try(torch.zeros(2, 30, dtype=torch.long)),
    "a name that is not known": Try(None),
}
