"""A `VoCoProcessor` is the model's own processor, with VoCo tokens in what it returns."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin, TextIteratorStreamer, pipeline

import tiny
import voco_plugin as vp
from tiny import processors
from voco_plugin.inference.answering import answer, compress_images

K = 2
VIDEO = {"qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>", "llava_onevision": "<video>"}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def chat(*parts: str | int) -> list[dict]:
    """A question of texts and of pictures by their seed."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": picture(part)}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


CHATS = [chat(1, "what is", 2), chat("what"), chat(3, "what color is the square")]
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
PADDED = {**TOKENIZED, "processor_kwargs": {"padding": True}}


def made(name: str = "llava_llama"):
    """An attached model, its ordinary processor and the one that puts VoCo tokens in."""
    try:
        plain = processors.processor(name)
    except ImportError as error:
        pytest.skip(str(error))
    model = vp.attach(tiny.build(name).eval(), vp.VoCoConfig(num_tokens=K), plain)
    return model, plain, vp.VoCoProcessor(plain, model)


shared = functools.cache(made)


def counted(output) -> list[int]:
    """VoCo tokens of each row."""
    voco = vp.attachment(shared()[0]).vocab.voco_id
    rows = output["input_ids"]
    return [list(map(int, row)).count(voco) for row in rows]


# -- what it gives
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in processors.NAMES if n not in ("llava_mistral", "llava_qwen2")])
def test_a_chat_is_that_of_insert_voco_tokens_bit_for_bit(name: str) -> None:
    model, plain, inserting = made(name)
    found = inserting.apply_chat_template(CHATS, **PADDED)
    expected = model.insert_voco_tokens(plain.apply_chat_template(CHATS, **PADDED))
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**found, **options), model.generate(**expected, **options))


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_a_call_is_that_of_insert_voco_tokens(name: str) -> None:
    model, plain, inserting = made(name)
    texts = [plain.apply_chat_template(talk, add_generation_prompt=True) for talk in CHATS]
    images = [[picture(1), picture(2)], [], [picture(3)]]
    for side in ("left", "right"):
        asked = {"images": images, "text": texts, "padding": True, "padding_side": side}
        found = inserting(**asked, return_tensors="pt", num_tokens=3)
        expected = model.insert_voco_tokens(plain(**asked, return_tensors="pt"), num_tokens=3)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert type(found) is type(plain(**asked, return_tensors="pt"))
        assert found.to(dtype=torch.float64)["pixel_values"].dtype == torch.float64


@pytest.mark.parametrize("name", VIDEO)
def test_videos_get_their_tokens(name: str) -> None:
    model, plain, inserting = made(name)
    clip = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    asked = {"videos": [clip], "text": [f"{VIDEO[name]} what"], "return_tensors": "pt"}
    found, expected = inserting(**asked), model.insert_voco_tokens(plain(**asked))
    assert int((found["input_ids"] == vp.attachment(model).vocab.voco_id).sum()) == K
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_rows_without_images_are_untouched() -> None:
    _, plain, inserting = shared()
    for asked in ({"text": "what"}, {"text": ["what", "the red"], "padding": True, "return_tensors": "pt"}):
        found, expected = inserting(**asked), plain(**asked)
        assert str(dict(found)) == str(dict(expected))
    assert list(inserting(images=picture(1), return_tensors="pt")) == ["pixel_values"]


@pytest.mark.parametrize("images", [[[1, 2], [3]], [1, 2, 3]], ids=["nested", "flat"])
def test_images_side_by_side_are_told_apart(images: list) -> None:
    opened = [[picture(s) for s in one] if isinstance(one, list) else picture(one) for one in images]
    asked = {"images": opened, "text": ["<image><image> what", "<image> x"]}
    assert counted(shared()[2](**asked, padding=True, return_tensors="pt")) == [2 * K, K]


def test_lists_and_arrays_come_back_as_they_came() -> None:
    inserting = shared()[2]
    two = {"images": [picture(1), picture(2)], "text": ["<image> what", "<image> the shape is"]}
    ragged, padded = inserting(**two), inserting(**two, padding=True, return_tensors="np")
    assert counted(ragged) == counted(padded) == [K, K]
    assert len(ragged["input_ids"][0]) < len(ragged["input_ids"][1]) == padded["input_ids"].shape[1]
    assert all(isinstance(row, list) for row in ragged["input_ids"])
    assert [len(m) for m in ragged["attention_mask"]] == [len(ids) for ids in ragged["input_ids"]]
    assert isinstance(padded["input_ids"], np.ndarray)
    assert len({len(row) for row in inserting(**two, padding=True)["input_ids"]}) == 1
    assert counted(inserting(picture(1), "<image> what")) == [K]  # by position, one text


def test_lengths_count_the_voco_tokens() -> None:
    inserting = shared()[2]
    asked = {"images": [picture(1)], "text": ["<image> what is the color of this"], "return_tensors": "pt"}
    whole = inserting(**asked)["input_ids"]
    for options in ({"truncation": True, "max_length": 13}, {"text_kwargs": {"max_length": 13}}):
        cut = inserting(**asked, **options)
        assert torch.equal(cut["input_ids"], whole[:, :13])
    assert inserting(**asked, padding="max_length", max_length=40)["input_ids"].shape == (1, 40)
    assert inserting(**asked, padding=True, pad_to_multiple_of=32)["input_ids"].shape == (1, 32)
    assert inserting(**asked, return_length=True)["length"].tolist() == [whole.shape[1]]
    with pytest.raises(vp.LayoutError, match="an image is never cut; set max_length to at least 11"):
        inserting(**asked, truncation=True, max_length=10)
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        inserting(**asked, return_overflowing_tokens=True)


def test_texts_that_hold_voco_tokens_are_left_or_refused() -> None:
    inserting = shared()[2]
    once = inserting(picture(1), "<image> what")["input_ids"]
    assert inserting(picture(1), "<image><voco><voco> what")["input_ids"] == once
    with pytest.raises(vp.LayoutError, match=r"has 1 VoCo token\(s\) already where 2 were asked for"):
        inserting(picture(1), "<image><voco> what")
    with pytest.raises(vp.LayoutError, match="follows no image"):
        inserting(text="<voco> what")


def test_k_is_the_configs_or_an_argument() -> None:
    model, plain, inserting = made()
    assert counted(inserting.apply_chat_template(CHATS[0], **TOKENIZED, num_tokens=3)) == [6]
    assert counted(inserting.apply_chat_template(CHATS[0], **TOKENIZED)) == [2 * K]
    two = {"images": [picture(1), picture(2)], "text": ["<image> a", "<image> b"], "padding": True}
    assert counted(inserting(**two, num_tokens=[1, 3])) == [1, 3]
    assert counted(vp.VoCoProcessor(plain, model, num_tokens=5)(picture(1), "<image> a")) == [5]
    assert counted(vp.VoCoProcessor(plain, vp.VoCoConfig(num_tokens=4))(picture(1), "<image> a")) == [4]
    vp.attachment(model).config.num_tokens = 7  # the model's own, as it is at the call
    assert counted(inserting(picture(1), "<image> a")) == [7]
    for wrong in (0, 2.5, True, "2"):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            inserting(picture(1), "<image> a", num_tokens=wrong)
    with ThreadPoolExecutor(4) as pool:
        many = pool.map(
            lambda k: counted(inserting.apply_chat_template(CHATS[2], **TOKENIZED, num_tokens=k)),
            [1, 2, 3] * 4,
        )
        assert list(many) == [[1], [2], [3]] * 4


def test_answers_are_marked_past_the_voco_tokens() -> None:
    _, plain, inserting = shared()
    answers = ["red", "blue square"]
    talks = [
        talk + [{"role": "assistant", "content": [{"type": "text", "text": said}]}]
        for talk, said in zip(CHATS[:2], answers, strict=True)
    ]
    asked = {**PADDED, "add_generation_prompt": False, "return_assistant_tokens_mask": True}
    found = inserting.apply_chat_template(talks, **asked)
    assert counted(found) == [2 * K, 0]
    for ids, mask, said in zip(found["input_ids"], found["assistant_masks"], answers, strict=True):
        assert plain.tokenizer.decode(ids[mask.bool()]) == f" {said}</s>"


# -- what takes it
# ------------------------------------------------------------------------------------------------------------


def test_pipelines_run_on_it() -> None:
    model, plain, inserting = shared()
    pipe = pipeline("image-text-to-text", model=model, processor=inserting)
    options = {"max_new_tokens": 4, "do_sample": False}

    def expected(talk) -> str:
        inputs = model.insert_voco_tokens(plain.apply_chat_template(talk, **TOKENIZED))
        new = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return plain.tokenizer.decode(new, skip_special_tokens=True)

    talks = [CHATS[0], CHATS[2]]
    assert expected(talks[0]) != expected(talks[1])
    for size in (1, 2):
        found = pipe(text=talks, batch_size=size, **options)
        assert [one[0]["generated_text"][-1]["content"] for one in found] == [expected(t) for t in talks]
    prompts = [plain.apply_chat_template(chat(s, "what"), add_generation_prompt=True) for s in (1, 3)]
    found = pipe(images=[picture(1), picture(3)], text=prompts, return_full_text=False, **options)
    ids = [
        model.generate(
            **model.insert_voco_tokens(plain(images=picture(s), text=t, return_tensors="pt")), **options
        )
        for s, t in zip((1, 3), prompts, strict=True)
    ]
    assert [one["generated_text"] for one in found] == plain.batch_decode(
        [row[0, -4:] for row in ids], skip_special_tokens=True
    )
    streamer = TextIteratorStreamer(inserting, skip_prompt=True, skip_special_tokens=True)
    asked = {
        "text": talks[0],
        "max_new_tokens": 4,
        "generate_kwargs": {"streamer": streamer, "do_sample": False},
    }
    thread = threading.Thread(target=pipe, kwargs=asked)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == expected(talks[0])


def test_this_packages_own_functions_take_it_too() -> None:
    model, plain, inserting = shared()
    row = {"messages": chat("what") + [{"role": "assistant", "content": "red"}], "images": [picture(1)]}
    row["messages"][0]["content"].insert(0, {"type": "image"})
    batches = [
        vp.VoCoDataCollator(its, voco=vp.VoCoConfig(num_tokens=3))([row]) for its in (plain, inserting)
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    told = []
    for its in (plain, inserting):
        cache = next(compress_images(model, its, [picture(1)], num_tokens=1))
        told.append(answer(model, its, ["what is"], caches=[cache], max_new_tokens=4))
        told[-1] += answer(model, its, ["what is"], images=[[picture(1)]], max_new_tokens=4)
    assert told[0] == told[1]
    assert vp.attachment(vp.attach(tiny.build("llava_llama"), None, inserting)).processor is plain


# -- what it is
# ------------------------------------------------------------------------------------------------------------


def test_it_is_the_processor_that_it_is_made_over() -> None:
    _, plain, inserting = made()
    assert isinstance(inserting, (type(plain), ProcessorMixin)) and isinstance(inserting, vp.VoCoProcessor)
    assert inserting.tokenizer is plain.tokenizer and inserting.image_processor is plain.image_processor
    assert inserting.plain is plain and vp.VoCoProcessor(inserting, shared()[0]).plain is plain
    assert inserting.model_input_names == plain.model_input_names
    assert inserting.batch_decode([[40, 41]]) == plain.batch_decode([[40, 41]])
    inserting.chat_template = plain.chat_template + " "
    assert plain.chat_template.endswith(" ")
    assert repr(inserting).startswith("VoCoProcessor (K=2) over LlavaProcessor")
    for again in (pickle.loads(pickle.dumps(inserting)), copy.deepcopy(inserting), copy.copy(inserting)):
        assert again(picture(1), "<image> a")["input_ids"] == inserting(picture(1), "<image> a")["input_ids"]
        again.chat_template = None  # its own
        assert plain.chat_template is not None


def test_saving_keeps_it_and_auto_processor_gives_the_ordinary_one(tmp_path) -> None:
    model, plain, inserting = made()
    model.save_pretrained(tmp_path)
    inserting = vp.VoCoProcessor(plain, model, num_tokens=3)
    for _ in range(2):
        inserting.save_pretrained(tmp_path)
    expected = inserting(picture(1), "<image> a")["input_ids"]
    kept = [
        vp.load(tmp_path)[1],
        vp.VoCoProcessor.from_pretrained(tmp_path),
        type(inserting).from_pretrained(tmp_path),
    ]
    assert all(isinstance(one, vp.VoCoProcessor) for one in kept)
    assert [one(picture(1), "<image> a")["input_ids"] for one in kept] == [expected] * 3
    ordinary = AutoProcessor.from_pretrained(tmp_path)
    for one in (ordinary, vp.load(tmp_path, inserting=False)[1]):
        assert type(one) is type(plain)
        assert one(picture(1), "<image> a")["input_ids"] == plain(picture(1), "<image> a")["input_ids"]
    ordinary.save_pretrained(tmp_path)  # what is saved last counts
    assert type(vp.load(tmp_path)[1]) is type(plain)
    assert isinstance(vp.load(tmp_path, inserting=True)[1], vp.VoCoProcessor)
    with pytest.raises(ValueError, match="holds an ordinary processor"):
        vp.VoCoProcessor.from_pretrained(tmp_path)


def test_what_it_cannot_be_made_of_is_refused() -> None:
    model, plain, inserting = made()
    for wrong in (None, "folder", 3):
        with pytest.raises(ValueError, match="neither an attached model nor a VoCoConfig"):
            vp.VoCoProcessor(plain, wrong)
    with pytest.raises(ValueError, match="has no VoCo attached"):
        vp.VoCoProcessor(plain, tiny.build("llava_llama"))
    with pytest.raises(ValueError, match="no processor of a vision-language model"):
        vp.VoCoProcessor(plain.tokenizer, model)
    other = processors.processor("llava_llama")
    with pytest.raises(ValueError, match="give the processor that the model was attached with"):
        vp.VoCoProcessor(other, model)
    with pytest.raises(ValueError, match="has no VoCo token '<voco>'; give the attached model"):
        vp.VoCoProcessor(other, vp.VoCoConfig())
    vp.detach(model)
    with pytest.raises(ValueError, match="the model was detached"):
        inserting(picture(1), "<image> a")
