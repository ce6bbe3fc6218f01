"""What a processor writes around an image is seen by running it, whatever its attributes are called."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import (
    Idefics2ImageProcessor,
    Idefics2Processor,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    SiglipImageProcessor,
)

import voco_plugin as vp
from harness import largest_difference, plain
from tiny import vision_ids, voco_id
from tiny.processors import processor as tiny_processor
from tiny.vocab import IDS, tokenizer
from voco_plugin.models.families import family_of
from voco_plugin.models.families.observe import observed_markers

BREAK, END, FAKE = IDS["<unused1>"], IDS["</img>"], IDS["<fake_token_around_image>"]


def pixtral():
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 16}, patch_size={"height": 4, "width": 4}
        ),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=4,
        spatial_merge_size=2,
        image_token="<image>",
        image_break_token="<unused1>",
        image_end_token="</img>",
    )


def idefics2():
    images = Idefics2ImageProcessor(size={"shortest_edge": 12, "longest_edge": 12}, do_image_splitting=False)
    return Idefics2Processor(image_processor=images, tokenizer=tokenizer(), image_seq_len=3)


def paligemma():
    images = SiglipImageProcessor(size={"height": 12, "width": 12})
    images.image_seq_length = 9
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer(image_token="<image>"))


MADE = {"mistral3": pixtral, "idefics2": idefics2, "paligemma": paligemma}


def test_row_breaks_and_end_are_seen():
    starts, others = observed_markers(pixtral(), {IDS["<image>"]})
    assert (starts, others) == (set(), {BREAK, END})


def test_the_outermost_token_opens_the_image():
    starts, others = observed_markers(tiny_processor("internvl"), {IDS["<IMG_CONTEXT>"]})
    assert (starts, others) == ({IDS["<img>"]}, {IDS["</img>"]})


def test_an_image_that_its_start_marker_stands_for_is_seen():
    starts, others = observed_markers(tiny_processor("gemma3"), {IDS["<image_soft_token>"]})
    assert (starts, others) == ({IDS["<start_of_image>"]}, {IDS["<end_of_image>"]})


def test_a_token_that_opens_and_closes_is_no_start():
    starts, others = observed_markers(tiny_processor("idefics3"), {IDS["<image>"]})
    assert not starts and {FAKE, IDS["<global-img>"], IDS["<row_1_col_1>"]} <= others


def test_a_processor_without_images_has_no_markers():
    assert observed_markers(tokenizer(), {IDS["<image>"]}) == (set(), set())


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_from_a_processor_to_two_stage_answers(name):
    """Two images with text between them, one, and none, through a processor whose family has no chat template
    here.
    """
    its, model = MADE[name](), plain(name)
    vp.attach(model, vp.VoCoConfig(num_tokens=2, token_id=voco_id(name), token="<unused0>"), its)
    vocabulary = vp.attachment(model).vocab
    # a family's video token has no place in a prompt of images
    assert vision_ids(name) - {IDS["<video>"]} <= vocabulary.placeholders | vocabulary.markers
    assert family_of(model.config).glue(model.config, its) == set()
    generator = torch.Generator().manual_seed(0)
    side = 16 if name == "mistral3" else 12
    pixels = torch.randint(0, 255, (3, side, side, 3), generator=generator, dtype=torch.uint8).numpy()
    first, second, third = (Image.fromarray(p) for p in pixels)
    token = its.image_token
    text = [f"{token} what color?", f"{token} the {token} same?"]
    batch = its(text=text, images=[[first], [second, third]], return_tensors="pt", padding=True)
    batch = model.insert_voco_tokens({k: v for k, v in batch.items() if k != "labels"})
    cache = model.compress(**batch)
    assert cache.rows == (0, 1, 1)
    stream = model.stream_inputs(batch)
    assert not set(stream["input_ids"].flatten().tolist()) & vision_ids(name)
    logits, cached = model(**batch).logits, model(**stream, voco_cache=cache).logits
    assert largest_difference(model, batch, logits, stream, cached) <= 1e-4
    both = model.generate(**batch, max_new_tokens=3, do_sample=False)
    after = model.generate(**stream, voco_cache=cache, max_new_tokens=3, do_sample=False)
    masked = model.generate(**batch, two_stage=False, max_new_tokens=3, do_sample=False)
    assert torch.equal(both[:, -3:], after[:, -3:]) and torch.equal(both[:, -3:], masked[:, -3:])
