"""Models whose weights accelerate keeps elsewhere between forwards: the same caches and the same answers."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import voco_plugin as vp
from harness import attached, inputs, plain, vocabulary
from tiny import voco_id
from voco_plugin.inference.answering import on_device
from voco_plugin.store.keys import fingerprint_of

CPU = torch.device("cpu")


def offloaded(model, how: str, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return disk_offload(model, str(folder), execution_device=CPU)
    where = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    return dispatch_model(
        model, {**where, "model.language_model": "disk"}, main_device="cpu", offload_dir=str(folder)
    )


@pytest.mark.parametrize("how", ["cpu", "disk", "partly"])
@torch.no_grad()
def test_an_offloaded_model_does_what_it_did(how, tmp_path):
    batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"], ["bos", "img", "c2", "t3", "t4"]])
    model = attached("llava_llama")
    stream, cache, made_by = model.stream_inputs(batch), model.compress(**batch), fingerprint_of(model)
    logits = model(**stream, voco_cache=cache).logits
    greedy = {"max_new_tokens": 4, "do_sample": False}
    answer, in_one = model.generate(**stream, voco_cache=cache, **greedy), model.generate(**batch, **greedy)

    model = offloaded(attached("llava_llama"), how, tmp_path)
    assert fingerprint_of(model) == made_by
    found = model(**stream, voco_cache=cache).logits
    torch.testing.assert_close(found, logits, atol=1e-6, rtol=0, equal_nan=True)
    again = model.compress(**batch)
    for ours, theirs in zip(again, cache, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-6, rtol=0)
    assert torch.equal(model.generate(**stream, voco_cache=cache, **greedy), answer)
    assert torch.equal(model.generate(**batch, **greedy), in_one)
    assert on_device(model, batch)["input_ids"].device == CPU
    assert fingerprint_of(model) == made_by


def test_weights_kept_in_memory_are_watched(monkeypatch):
    """And nothing is hashed again though each forward gives the modules other tensors."""
    from voco_plugin.cache import fingerprint

    batch = inputs("llava_llama")
    model = offloaded(attached("llava_llama"), "cpu", None)
    cache = model.compress(**batch)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_hash_tensor", lambda *args: 1 / 0)
        model(**model.stream_inputs(batch), voco_cache=cache)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    layer._hf_hook.weights_map["weight"].data.mul_(2)
    with pytest.raises(ValueError, match="model is"):
        model(**model.stream_inputs(batch), voco_cache=cache)


def test_a_row_that_cannot_be_written_is_refused(tmp_path):
    model = offloaded(plain("llava_llama"), "cpu", tmp_path)
    config = vp.VoCoConfig(token_id=voco_id("llava_llama"))
    with pytest.raises(ValueError, match="row of '<voco>' cannot be written: .* offloaded"):
        vp.attach(model, config, vocabulary=vocabulary("llava_llama", model, config), initialize_token=True)
    assert not vp.is_attached(model)


def test_a_model_without_weights_makes_no_cache():
    model = attached("llava_llama").to("meta")
    with pytest.raises(ValueError, match="has no values"):
        fingerprint_of(model)
