"""The ids a family's sequences are read by, from its real processor and config; the whole path through a
processor.
"""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from harness import largest_difference, plain
from random_pictures import pictures
from tiny import NAMES, glue_ids, vision_ids, voco_id
from tiny.processors import NAMES as PROCESSORS
from tiny.processors import processor
from voco_plugin.models.families import family_of, vocabulary_for


def _processor(name):
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLMProcessor needs num2words")
    return processor(name)


@pytest.mark.parametrize("name", PROCESSORS)
def test_markers_and_glue_are_read_off_the_processor(name):
    its, model = _processor(name), plain(name)
    voco = vp.VoCoConfig(token_id=voco_id(name))
    with_config = vocabulary_for(processor=its, config=model.config, voco=voco)
    assert vision_ids(name) <= with_config.placeholders | with_config.markers
    assert with_config.glue == glue_ids(name)
    assert with_config.starts <= with_config.markers
    alone = vocabulary_for(processor=its, voco=voco)
    assert vision_ids(name) <= alone.placeholders | alone.markers and alone.glue == glue_ids(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_image_token_is_read_off_the_config(name):
    model = plain(name)
    found = family_of(model.config).vocabulary(
        config=model.config, voco=vp.VoCoConfig(token_id=voco_id(name))
    )
    assert found.placeholders & vision_ids(name)


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_from_messages_to_two_stage_answers(name):
    """Chat template → processor → VoCo tokens → compress → answer, on images that a processor prepared."""
    its, model = _processor(name), plain(name)
    vp.attach(model, vp.VoCoConfig(num_tokens=2, token="<voco>"), its)
    first, second, third = pictures(3)
    image = {"type": "image"}
    talk = [
        [{"role": "user", "content": [{**image, "image": first}, {"type": "text", "text": "what color?"}]}],
        [
            {
                "role": "user",
                "content": [
                    {**image, "image": second},
                    {"type": "text", "text": " and "},
                    {**image, "image": third},
                    {"type": "text", "text": " is the same?"},
                ],
            }
        ],
        [{"role": "user", "content": [{"type": "text", "text": "no image here"}]}],
    ]
    batch = its.apply_chat_template(
        talk,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    batch = model.insert_voco_tokens(dict(batch))
    logits = model(**batch).logits
    cache = model.compress(**batch)
    assert cache.num_tokens == [2, 2, 2] and cache.rows == (0, 1, 1)
    stream = model.stream_inputs(batch)
    assert not set(stream["input_ids"].flatten().tolist()) & vision_ids(name), "no marker stays in the stream"
    cached = model(**stream, voco_cache=cache).logits
    assert largest_difference(model, batch, logits, stream, cached) <= 1e-4
    made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    ids = model.generate(**stream, voco_cache=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(made[:, -4:], ids[:, -4:])


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_a_stream_made_without_the_image_is_the_stream_of_the_image(name):
    """Answering from a file: the prompt's tokens are those that are left when the real image's are
    dropped.
    """
    from voco_plugin.inference.prompts import ask, encode, stream_of

    its, model = _processor(name), plain(name)
    vp.attach(model, vp.VoCoConfig(num_tokens=3), its)
    first, second, third = pictures(3)
    talks = [ask("what color?"), ask("is the same?", num_images=2)]
    batch = model.insert_voco_tokens(encode(its, talks, [[first], [second, third]]))
    cache = model.compress(**batch)
    made, expected = stream_of(model, its, talks, cache), model.stream_inputs(batch)
    assert torch.equal(made["input_ids"], expected["input_ids"])
    assert torch.equal(made["attention_mask"], expected["attention_mask"])
