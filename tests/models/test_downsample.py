"""``compressor="downsample"``: the features of a shrunk image, against a tower made for that size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import voco_plugin as vp
from harness import attached, inputs, trained
from tiny.parts import PATCH, write_encoder, write_llm
from voco_plugin.core.packed_rows import pack_batch
from voco_plugin.models.compressors import build_compressor
from voco_plugin.models.encoders.towers import resized

ROWS = [["bos", "t3", "img", "c4", "t4"], ["img", "c1", "t1", "img", "c4", "t5"], ["bos", "t6"]]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """encoder → a model composed of it, attached with K = 1, and its processor."""
    root, known = tmp_path_factory.mktemp("parts"), {}

    def get(encoder: str):
        if encoder not in known:
            if encoder == "timm_convnext":
                pytest.importorskip("timm", reason="timm is in the extra `backbones`")
            more = {"image_size": 64} if encoder == "timm_convnext" else {}
            llm = root / "llama"
            llm = str(llm) if llm.is_dir() else write_llm(root, "llama")
            model, processor = vp.compose(write_encoder(root, encoder), llm, "mlp2x_gelu", **more)
            with torch.no_grad():
                for weight in model.model.multi_modal_projector.parameters():
                    if weight.dim() > 1:
                        weight.mul_(10)
            vp.attach(model, vp.VoCoConfig(compressor="downsample"), processor)
            known[encoder] = trained(model), processor
        return known[encoder]

    return get


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (24, 20, 3), dtype=np.uint8))


def batch_of(processor):
    texts = ["<s>one <image> is what it?", "<s><image>and <image> is the color red blue"]
    images = [[picture(0)], [picture(1), picture(2)]]
    return processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")


# -- the features


@pytest.mark.parametrize(("encoder", "k"), [("clip", 1), ("clip", 4), ("siglip", 4), ("timm_convnext", 1)])
@torch.no_grad()
def test_features_are_those_of_a_tower_made_for_the_small_image(composed, encoder, k):
    model, processor = composed(encoder)
    pixels = batch_of(processor)["pixel_values"]
    n = {"timm_convnext": 4}.get(encoder, 16)
    found = model.voco_compressor.features(model, pixels, n, k)
    side = {1: 1, 4: 2}[k] * (32 if encoder == "timm_convnext" else PATCH)
    small = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    tower = model.model.vision_tower
    if encoder == "timm_convnext":
        seen = tower(small).last_hidden_state.flatten(2).transpose(1, 2)
    else:
        layer = model.config.vision_feature_layer
        seen = resized(tower, side)(small, output_hidden_states=True).hidden_states[layer]
        seen = seen[:, 1:] if encoder == "clip" else seen
    torch.testing.assert_close(found, model.model.multi_modal_projector(seen), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2, "it sees the image"


@torch.no_grad()
def test_shrinking_loses_no_pixel(composed):
    """Stripes shrink to their mean; the two pixels beside each new one's middle alone would be all 1."""
    model, _ = composed("clip")
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0] * 4).expand(16, 16)
    seen: list[torch.Tensor] = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.voco_compressor.features(model, stripes.expand(1, 3, 16, 16), 16, 1)
    handle.remove()
    assert seen[0].shape == (1, 3, 4, 4) and seen[0].abs().max() < 0.1


def test_new_weights_give_the_features_as_they_are():
    compressor = build_compressor(vp.VoCoConfig(compressor="downsample", num_tokens=4), 6)
    vision = torch.randn(2, 4, 6)
    torch.testing.assert_close(compressor(vision, torch.zeros(4, 6)), vision)


# -- in a model


@pytest.mark.parametrize("encoder", ["clip", "siglip", "timm_convnext"])
@torch.no_grad()
def test_two_stages_are_the_single_pass(composed, encoder):
    model, processor = composed(encoder)
    batch = model.insert_voco_tokens(batch_of(processor), padding_side="left")
    logits, cache, stream = model(**batch).logits, model.compress(**batch), model.stream_inputs(batch)
    cached = model(**stream, voco_cache=cache).logits
    assert cache.num_tokens == [1, 1, 1]
    assert (logits[:, -1] - cached[:, -1]).abs().max() <= 1e-4
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**other).logits[:, -1] - logits[:, -1]).abs().max() > 1e-2
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 3
    alone = model.compress(**batch, max_memory=1 << 30)  # a chunk a block, if it must
    for one, two in zip(cache.blocks, alone.blocks, strict=True):
        torch.testing.assert_close(one.keys[0], two.keys[0])


@pytest.mark.parametrize("context", ["self", "prefix"])
@torch.no_grad()
def test_blocks_of_several_k_and_packed_rows(context):
    model = attached("llava_llama", compressor="downsample", num_tokens=4, block_context=context).eval()
    alone = inputs("llava_llama", ROWS)
    logits = model(**alone).logits
    stream = model.stream_inputs(alone)
    cached = model(**stream, voco_cache=model.compress(**alone)).logits
    for row, last in enumerate(alone["attention_mask"].sum(dim=1) - 1):
        end = stream["attention_mask"][row].nonzero().max()
        assert (logits[row, last] - cached[row, end]).abs().max() <= 1e-4
    packed = pack_batch(alone, [2, 1], pad_token_id=0)
    found = model(**packed).logits[packed["document_ids"] > 0]
    assert (logits[alone["attention_mask"].bool()] - found).abs().max() <= 1e-5


# -- what it does not do


@pytest.mark.parametrize(
    ("name", "k", "says"),
    [
        ("llava_llama", 2, "num_tokens=2 is none; use 1 or 4"),
        ("qwen2_5_vl", 4, "a qwen2_5_vl model takes images in another way"),
        ("llava_onevision", 4, "a llava_onevision model takes images in another way"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_when_attached(name, k, says):
    with pytest.raises(ValueError, match=says):
        attached(name, compressor="downsample", num_tokens=k)


def test_a_tower_of_one_size_is_refused(tmp_path):
    pytest.importorskip("open_clip", reason="open-clip-torch is in the extra `backbones`")
    model, processor = vp.compose(write_encoder(tmp_path, "open_clip"), write_llm(tmp_path, "llama"))
    with pytest.raises(
        ValueError, match="OpenClipVisionModel in a llava model takes images .* of one size only"
    ):
        vp.attach(model, vp.VoCoConfig(compressor="downsample"), processor)
    assert not vp.is_attached(model)


def test_what_is_no_image_a_block_is_refused_in_a_line():
    model = attached("llava_llama", compressor="downsample", num_tokens=4).eval()
    batch = inputs("llava_llama", [["bos", "img", "c2", "t2"]])
    with pytest.raises(ValueError, match="num_tokens=2 is none"):
        model(**batch)
    batch = inputs("llava_llama", [["bos", "img", "c16", "t2"]])
    with pytest.raises(ValueError, match="9 vision tokens of 12 × 12 pixels are not to be shrunk to 16"):
        model(**batch)
    batch = inputs("llava_llama", [["bos", "img", "c4", "t2"]])
    with pytest.raises(ValueError, match=r"for 1 block\(s\) pixel_values are none.*generate in two stages"):
        model.generate(**batch, max_new_tokens=2, two_stage=False)
    two = inputs("llava_llama", [["bos", "img", "img", "c4", "t2"]])
    with pytest.raises(ValueError, match=r"for 1 block\(s\) pixel_values are of shape \(2, "):
        model(**two)
