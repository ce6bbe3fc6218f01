"""What tests/models/test_attach.py holds; run on broken versions too."""

from __future__ import annotations

import torch

import voco_plugin as vp
from harness import plain
from tiny.processors import processor


def state_bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def the_token_is_added_and_taken_back(name):
    """llava_llama has no spare row (resize), llava_qwen2 a vocabulary of 256 = 4 × 64, llava_tied tied
    embeddings.
    """
    model, its = plain(name), processor(name)
    rows, tied = model.get_input_embeddings().weight.shape[0], name in ("llava_tied", "gemma3")
    before, vocabulary_before = state_bits(model), dict(its.tokenizer.get_vocab())
    known = model.get_input_embeddings().weight[: len(its.tokenizer)].clone()
    vp.attach(model, vp.VoCoConfig(token="<voco-new>"), its)
    token = its.tokenizer.convert_tokens_to_ids("<voco-new>")
    assert token == vp.attachment(model).vocab.voco_id == vp.attachment(model).config.token_id
    assert its.tokenizer("<voco-new><voco-new>", add_special_tokens=False)["input_ids"] == [token, token]
    weight = model.get_input_embeddings().weight
    assert (weight.shape[0] % 64 == 0) == (rows % 64 == 0) and weight.shape[0] > token
    assert (weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()) == bool(tied)
    assert (weight[token] - known.mean(dim=0)).abs().max() < 0.05 * known.std()
    vp.detach(model)
    assert equal_bits(before, state_bits(model)) and its.tokenizer.get_vocab() == vocabulary_before
