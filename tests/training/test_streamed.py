"""``stage1: streamed``: loss and gradients of the two stages are those of one pass under the rule, whatever
the batch holds; memory does not grow with the images.
"""

# ruff: noqa: F811  (the fixtures of another test file)

from __future__ import annotations

import pytest
import torch

from contracts.streamed import RULES, check, everything, fused, fused_step
from harness import CORE, attached, inputs
from voco_plugin.training.two_stage.trainer_part import Streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CORE)
def test_loss_and_gradients_are_those_of_one_pass(name, dtype):
    check(name, dtype=dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rule", RULES)
def test_so_under_every_option_of_the_rule(rule, side, checkpointing):
    check("llava_llama", rule, side=side, checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["llava_mistral", "qwen2_5_vl", "gemma3", "idefics3", "llava_onevision"])
def test_so_with_layers_checkpointed_and_answers_alone_counted(name):
    # llava_onevision tells the images of one row apart by their row alone: five of them share a chunk
    check(name, side="left", checkpointing=True, text=True, chunk=5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_so_for_every_size_of_a_chunk(chunk):
    check("llava_llama", chunk=chunk, checkpointing=True)


def kept_bytes(frames: int, streamed: bool) -> int:
    """What autograd keeps between a step's forward and its backward."""
    model = attached("llava_llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs("llava_llama", [["bos", "t2", *["img", "c2"] * frames, "t4"]])
    given = {**batch, "labels": everything(model, batch, text_only=True), "fused_lm_head": True}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch.values())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = Streamed(2, fused_step(model)).run(model, **given) if streamed else fused(model)(**given)
    assert loss.requires_grad
    return sum(kept.values())


def test_what_is_kept_of_a_frame_is_its_voco_tokens_keys_and_values():
    joint, streamed = ((kept_bytes(12, way) - kept_bytes(4, way)) / 8 for way in (False, True))
    config = attached("llava_llama").config.get_text_config()
    heads = config.num_key_value_heads * config.head_dim
    voco = 2 * 2 * config.num_hidden_layers * heads * 4  # K tokens, keys and values, fp32
    # once as blocks laid out, once more for every query head that shares them; a mask's columns
    assert voco <= streamed <= 6 * voco, (streamed, voco)
    assert joint > 4 * streamed, (joint, streamed)
