"""What tests/inference/test_decoding.py holds; run on broken versions too."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from harness import inputs, plain, shared

ONE = [["bos", "t2", "img", "c2", "t1", "img", "c1", "t4"]]


def draft(rows: int) -> hf.PreTrainedModel:
    """A language model of the same vocabulary that never saw an image."""
    config = hf.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return hf.LlamaForCausalLM(config).eval()


def text_twin(name: str, rows: int):
    """The same weights without VoCo: reads the text alone."""
    model = plain(name)
    model.resize_token_embeddings(rows)
    return model


def assisted_decoding_gives_the_same_answers(name, how):
    model = shared(name)
    batch = inputs(name, ONE, "left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    new = {"max_new_tokens": 12, "do_sample": False}
    if name == "qwen2_5_vl" and how == "draft":
        with pytest.raises(ValueError, match="LlamaForCausalLM, which counts positions on one axis"):
            model.generate(**stream, voco_cache=cache, **new, assistant_model=draft(211))
        return
    expected = model.generate(**batch, **new, two_stage=False)[:, batch["input_ids"].shape[1] :]
    how = {
        "draft": {"assistant_model": draft(model.config.get_text_config().vocab_size)},
        "lookup": {"prompt_lookup_num_tokens": 3},
        # a draft that is right most of the time, so that several tokens are accepted at once
        "same": {"assistant_model": text_twin(name, model.config.get_text_config().vocab_size)},
    }[how]
    made = model.generate(**stream, voco_cache=cache, **new, **how)
    assert torch.equal(made[:, stream["input_ids"].shape[1] :], expected)
