"""``vp.log_likelihood`` gives what one plain forward a continuation gives, and reads each prompt once."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import voco_plugin as vp
from sessions import made, pictures
from tiny import build
from tiny.processors import processor
from voco_plugin.core.layout import tokenizer_of
from voco_plugin.inference.answering import compress_images
from voco_plugin.inference.prompts import adds_special_tokens, ask, render, run_processor

NAMES = ["llava_llama", "qwen2_5_vl", "gemma3", "llava_mistral", "internvl"]
ENDS = [
    ["red", "blue circle", "the shape is a green square, and what is the color? red red red", "red", "a</s>"],
    ["\n", " is", "1", " blue", "x"],
    ["green"],
]
QUESTIONS = ["What is it?", "Which of the two is red, and which color is the other?", "Red?"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return made(request.param)


def texts_of(tools, talks):
    return [render(tools, [talk])[0] for talk in talks]


def plainly(model, tools, text, ending, images, insert=True):
    """The plainest way: one whole forward, log_softmax, sum; the boundary as the documentation has it."""
    special = adds_special_tokens(tools, [text])
    tokens = lambda t: tokenizer_of(tools)(t, add_special_tokens=special)["input_ids"]  # noqa: E731
    whole, alone, bare = tokens(text + ending), tokens(text), tokens(text.rstrip(" "))
    begin = 0
    while begin < min(map(len, (whole, alone, bare))) and whole[begin] == alone[begin] == bare[begin]:
        begin += 1
    count = len(whole) - begin
    more = {"images": [list(images)]} if images else {}
    inputs = run_processor(tools, [text + ending], add_special_tokens=special, **more)
    if images and insert:
        inputs = model.insert_voco_tokens(inputs, padding_side="left")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -count - 1 : -1]
    ids = inputs["input_ids"][0, -count:]
    assert ids.tolist() == whole[begin:]
    chosen = logits.double().log_softmax(-1).gather(1, ids[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == ids).all()), count


def agree(found, wanted):
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for got, want in zip(sum(found, []), sum(wanted, []), strict=True):
        assert got.log_likelihood == pytest.approx(want[0], abs=1e-4)
        assert got.is_greedy == want[1]


def expected(model, tools, talks, ends, images, insert=True):
    texts = texts_of(tools, talks)
    return [
        [plainly(model, tools, text, one, row, insert) for one in listed]
        for text, listed, row in zip(texts, ends, images, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_images_in_one_pass_and_caches_give_the_plain_forwards_sums(pair, batch_size) -> None:
    model, tools = pair
    shown = pictures(3)
    images = [shown[:1], shown[1:], shown[:1]]
    talks = [ask(q, len(row)) for q, row in zip(QUESTIONS, images, strict=True)]
    wanted = expected(model, tools, talks, ENDS, images)
    single = vp.log_likelihood(model, tools, QUESTIONS, ENDS, images=images, batch_size=batch_size)
    agree(single, wanted)
    blocks = list(compress_images(model, tools, shown))
    caches = [blocks[0], vp.VoCoCache.cat(blocks[1:]), blocks[0]]
    agree(vp.log_likelihood(model, tools, QUESTIONS, ENDS, caches=caches, batch_size=batch_size), wanted)


@pytest.mark.parametrize("attached", [True, False])
def test_text_alone_and_plain_models_give_the_plain_forwards_sums(pair, attached) -> None:
    model, tools = pair
    plain = build(type_of(model)) if not attached else model
    talks = [ask(q, 0) for q in QUESTIONS]
    found = vp.log_likelihood(plain, tools, iter(QUESTIONS), ENDS, batch_size=2)  # several forks of a prompt
    agree(found, expected(plain, tools, talks, ENDS, [[]] * 3))
    if not attached:
        images = [[one] for one in pictures(3)]
        wanted = expected(plain, tools, [ask(q, 1) for q in QUESTIONS], ENDS, images, insert=False)
        agree(vp.log_likelihood(plain, tools, QUESTIONS, ENDS, images=images), wanted)


def type_of(model) -> str:
    names = {"llava": "llava_llama", "qwen2_5_vl": "qwen2_5_vl", "gemma3": "gemma3", "internvl": "internvl"}
    if getattr(model.config.get_text_config(), "model_type", "") == "mistral":
        return "llava_mistral"
    return names[model.config.model_type]


def test_a_prompt_with_no_image_among_others_and_one_with_no_continuation(pair) -> None:
    model, tools = pair
    (image,) = pictures(1)
    ends = [["red", " blue"], [], ["green", "x y z"]]
    images = [[], [image], [image]]
    talks = [ask(q, len(row)) for q, row in zip(QUESTIONS, images, strict=True)]
    found = vp.log_likelihood(model, tools, QUESTIONS, ends, images=images)
    agree(found, expected(model, tools, talks, ends, images))
    (block,) = compress_images(model, tools, [image])
    caches = [vp.VoCoCache(), block, block]
    agree(vp.log_likelihood(model, tools, QUESTIONS, ends, caches=caches), found)


def test_the_greedy_answer_is_said_to_be_greedy_and_no_other() -> None:
    model, tools = made("qwen2_5_vl")
    questions = [f"What is {n}?" for n in range(6)]
    images = [[one] for one in pictures(6)]
    texts = texts_of(tools, [ask(q, 1) for q in questions])
    said, kept = [], []
    for number, (text, row) in enumerate(zip(texts, images, strict=True)):
        inputs = model.insert_voco_tokens(run_processor(tools, [text], images=[row]), padding_side="left")
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = tools.tokenizer.decode(ids)
        before = tools.tokenizer(text)["input_ids"]
        if tools.tokenizer(text + words)["input_ids"] == before + ids.tolist():  # words say which tokens
            said.append(words)
            kept.append(number)
    assert len(kept) >= 2
    found = vp.log_likelihood(
        model, tools, [questions[n] for n in kept], [[one, one[:-1] + "~", "~" + one[1:]] for one in said],
        images=[images[n] for n in kept],
    )  # fmt: skip
    assert [[one.is_greedy for one in row] for row in found] == [[True, False, False]] * len(kept)
    assert all(row[0].log_likelihood > row[1].log_likelihood for row in found)


def test_each_prompt_is_read_once_and_each_token_of_a_continuation_at_most_once() -> None:
    model, tools = made("llava_llama")
    blocks = list(compress_images(model, tools, pictures(2)))
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    ends = [["red", "blue", " a", "x"], ["x y", "1", "circle", "z"]]  # of one length each, but for one
    vp.log_likelihood(model, tools, ["What is it?"] * 2, ends, caches=blocks)
    assert len(seen) == 2 and seen[0][0] == 2 and seen[0][1] < 40
    read = sum(rows * tokens for rows, tokens in seen[1:])
    assert read <= 8 * 4
    seen.clear()
    vp.log_likelihood(model, tools, ["What is it?"], [["red"]], caches=blocks[:1])
    assert len(seen) == 1  # one token: the prompt's own logits say it


def test_order_and_company_change_nothing() -> None:
    model, tools = made("llava_llama")
    images = [[one] for one in pictures(3)]
    whole = vp.log_likelihood(model, tools, QUESTIONS, ENDS, images=images)
    back = vp.log_likelihood(
        model, tools, QUESTIONS[::-1], [row[::-1] for row in ENDS[::-1]], images=images[::-1]
    )
    agree([row[::-1] for row in back[::-1]], whole)
    alone = vp.log_likelihood(model, tools, QUESTIONS[:1], [ENDS[0][:1]], images=images[:1])
    agree(alone, [whole[0][:1]])


def test_spaces_and_merged_tokens_at_the_boundary() -> None:
    """The tiny vocabulary merges `` red``; the space that the template ends with goes to the continuation."""
    model, tools = made("llava_llama")
    assert render(tools, [ask("What?", 0)])[0].endswith("ASSISTANT: ")
    (row,) = vp.log_likelihood(model, tools, ["What?"], [["red", "q"]])
    text = render(tools, [ask("What?", 0)])[0]
    for ending, got, count in zip(["red", "q"], row, [1, 2], strict=True):
        value, _, tokens = plainly(model, tools, text, ending, [])
        assert tokens == count and got.log_likelihood == pytest.approx(value, abs=1e-4)


def test_a_continuation_that_changes_the_prompts_last_tokens_counts_from_there() -> None:
    """``\\n`` + ``\\n`` is one token of the tiny vocabulary, and the chat template ends with ``\\n``."""
    model, tools = made("qwen2_5_vl")
    talk = ask("What?", 1)
    text = render(tools, [talk])[0]
    assert text.endswith("\n")
    ends = [["\nred", "red", "\n"], ["blue", "red"]]
    images = [[one] for one in pictures(2)]
    found = vp.log_likelihood(model, tools, ["What?"] * 2, ends, images=images)
    agree(found, expected(model, tools, [talk] * 2, ends, images))
    blocks = list(compress_images(model, tools, pictures(2)))
    agree(vp.log_likelihood(model, tools, ["What?"] * 2, ends, caches=blocks), found)


def test_end_tokens_count() -> None:
    model, tools = made("llava_llama")
    ((bare, ended),) = vp.log_likelihood(model, tools, ["What?"], [["red", "red</s>"]])
    assert ended.log_likelihood < bare.log_likelihood - 1e-3


def test_messages_are_prompts_too(pair) -> None:
    model, tools = pair
    (image,) = pictures(1)
    bare = ask("What is it?", 1)
    talk = [{"role": "user", "content": [{"type": "image", "image": image}, bare[0]["content"][1]]}]
    found = vp.log_likelihood(model, tools, [talk], [["red", "blue"]])
    agree(found, vp.log_likelihood(model, tools, ["What is it?"], [["red", "blue"]], images=[[image]]))


def test_a_frozen_first_stage_compresses_first() -> None:
    tools = processor("llava_llama")
    config = vp.VoCoConfig(num_tokens=2, frozen_stage1=True)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(vp.attach(build("llava_llama"), config, processor=tools), lora).eval()
    images = [[one] for one in pictures(2)]
    ends = [["red", "blue"], ["x"]]
    found = vp.log_likelihood(model, tools, ["What?"] * 2, ends, images=images)
    blocks = list(compress_images(model, tools, pictures(2)))
    agree(found, vp.log_likelihood(model, tools, ["What?"] * 2, ends, caches=blocks))


def test_the_model_and_the_cache_are_as_they_were() -> None:
    model, tools = made("llava_llama")
    model.train()
    (block,) = compress_images(model, tools, pictures(1))
    before = [k.clone() for k in block.blocks[0].keys]
    first = vp.log_likelihood(model, tools, ["What?"], [["red", "x y z"]], caches=[block])
    again = vp.log_likelihood(model, tools, ["What?"], [["red", "x y z"]], caches=[block])
    assert first == again and model.training
    assert all(torch.equal(a, b) for a, b in zip(before, block.blocks[0].keys, strict=True))


@pytest.mark.parametrize(
    ("prompts", "ends", "words"),
    [
        ("What?", ["a"], "prompts is one prompt"),
        (["What?"], ["a", "b"], r"2 list\(s\) for 1 prompt"),
        (["What?"], "ab", "one string"),
        (["What?"], ["ab"], r"continuations\[0\] is one string"),
        (["What?"], [["a", ""]], "nothing to score"),
        (["What?"], [["a", [3]]], "nothing to score"),
        (["What?"], [["<image>"]], "image or VoCo token"),
        (["What?"], [["red<voco>"]], "image or VoCo token"),
        ([[{"role": "user"}]], [["a"]], "a 'role' and a 'content'"),
        ([None], [["a"]], "give a list of turns"),
    ],
)
def test_mistakes_get_one_line(prompts, ends, words) -> None:
    model, tools = made("llava_llama")
    with pytest.raises(ValueError, match=words) as told:
        vp.log_likelihood(model, tools, prompts, ends)
    assert "\n" not in str(told.value)


def test_a_plain_model_reads_no_cache_and_no_image_token() -> None:
    model, tools = made("llava_llama")
    (block,) = compress_images(model, tools, pictures(1))
    plain = build("llava_llama")
    with pytest.raises(ValueError, match="without VoCo attached"):
        vp.log_likelihood(plain, tools, ["What?"], [["a"]], caches=[block])
    with pytest.raises(ValueError, match="image or VoCo token"):
        vp.log_likelihood(plain, tools, ["What?"], [["<image>"]])
    with pytest.raises(ValueError, match="batch_size=0"):
        vp.log_likelihood(model, tools, ["What?"], [["a"]], batch_size=0)
    assert vp.log_likelihood(model, tools, [], []) == []
