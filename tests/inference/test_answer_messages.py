"""``vp.answer`` takes chat messages: images in the content or beside it, several turns, a system turn."""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from sessions import NEW, made, pictures
from tiny import build
from voco_plugin.inference.answering import inputs_of

NAMES = ["llava_llama", "qwen2_5_vl", "gemma3", "idefics3"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return made(request.param)


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(picture=None, key: str = "image") -> dict:
    return {"type": "image"} if picture is None else {"type": "image", key: picture}


def long_talk(first=None, second=None) -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        user(image(first), text("What is it?")),
        {"role": "assistant", "content": "A cat."},
        user(text("And this?"), image(second), text("Say.")),
    ]


def test_a_question_and_the_same_words_as_messages_get_the_same_answer(pair, tmp_path) -> None:
    model, tools = pair
    shown = pictures(2)
    questions = ["What is it?", "Which color is the other?"]
    wanted = vp.answer(model, tools, questions, images=[[one] for one in shown], **NEW)
    asked = [[user(image(one), text(q))] for one, q in zip(shown, questions, strict=True)]
    assert vp.answer(model, tools, messages=asked, **NEW) == wanted
    places = []
    for number, one in enumerate(shown):
        one.save(tmp_path / f"{number}.png")
        places.append(tmp_path / f"{number}.png")
    for key, kind in (("path", str), ("url", str), ("image", str), ("image", lambda p: p)):
        asked = [[user(image(kind(p), key), text(q))] for p, q in zip(places, questions, strict=True)]
        assert vp.answer(model, tools, messages=asked, **NEW) == wanted
    bare = [[user(image(), text(q))] for q in questions]
    assert vp.answer(model, tools, messages=bare, images=[[one] for one in shown], **NEW) == wanted
    blocks = list(vp.compress_images(model, tools, shown))
    cached = vp.answer(model, tools, messages=bare, caches=blocks, **NEW)
    assert cached == vp.answer(model, tools, questions, caches=blocks, **NEW) == wanted
    assert vp.answer(model, tools, messages=asked, caches=blocks, **NEW) == wanted  # no image is opened


def test_several_turns_and_a_system_turn_from_caches_as_from_images(pair) -> None:
    model, tools = pair
    first, second = pictures(2)
    asked = [long_talk(first, second), [user(text("Hello?"))], [user(image(second), text("Now?"))]]
    wanted = [vp.answer(model, tools, messages=[one], **NEW)[0] for one in asked]
    assert vp.answer(model, tools, messages=asked, batch_size=1, **NEW) == wanted
    one, two = vp.compress_images(model, tools, [first, second])
    caches = [vp.VoCoCache.cat([one, two]), vp.VoCoCache(), two]
    bare = [long_talk(), [user(text("Hello?"))], [user(image(), text("Now?"))]]
    assert vp.answer(model, tools, messages=bare, caches=caches, **NEW) == wanted


def test_the_logits_of_a_conversation_are_those_of_what_the_processor_makes_of_it() -> None:
    """Against the processor's own reading of the messages, with the images in it."""
    model, tools = made("qwen2_5_vl")
    first, second = pictures(2)
    own = tools.apply_chat_template(
        [[{**t, "content": [text(t["content"])] if isinstance(t["content"], str) else t["content"]}
          for t in long_talk(first, second)]],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(**model.insert_voco_tokens(dict(own), padding_side="left")).logits[:, -1]
        from voco_plugin.inference.messages import conversations

        talks, shown = conversations([long_talk(first, second)])
        found = model(**inputs_of(model, tools, talks, shown)).logits[:, -1]
        cache = vp.VoCoCache.cat(vp.compress_images(model, tools, [first, second]))
        two = model(**inputs_of(model, tools, talks, None, [cache])).logits[:, -1]
    assert torch.equal(found, wanted) and (two - wanted).abs().max() < 1e-4


def test_the_order_of_caches_and_images_is_that_of_the_parts() -> None:
    model, tools = made("llava_llama")
    first, second = pictures(2)
    one, two = vp.compress_images(model, tools, [first, second])
    there = vp.answer(model, tools, messages=[long_talk()], caches=[vp.VoCoCache.cat([one, two])], **NEW)
    back = vp.answer(model, tools, messages=[long_talk()], caches=[vp.VoCoCache.cat([two, one])], **NEW)
    assert there == vp.answer(model, tools, messages=[long_talk(first, second)], **NEW)
    assert back == vp.answer(model, tools, messages=[long_talk(second, first)], **NEW)
    mixed = vp.answer(model, tools, messages=[long_talk(first)], images=[[second]], **NEW)
    assert mixed == there
    scores = [
        vp.log_likelihood(model, tools, [long_talk()], [["a"]], caches=[vp.VoCoCache.cat(blocks)])[0][0]
        for blocks in ([one, two], [two, one])
    ]
    inside = vp.log_likelihood(model, tools, [long_talk(first, second)], [["a"]])[0][0]
    assert scores[0].log_likelihood == pytest.approx(inside.log_likelihood, abs=1e-4)
    assert abs(scores[0].log_likelihood - scores[1].log_likelihood) > 1e-2


def test_a_plain_model_answers_messages() -> None:
    plain, tools = build("llava_llama"), made("llava_llama")[1]
    (shown,) = pictures(1)
    found = vp.answer(plain, tools, messages=[[user(image(shown), text("What?"))]], **NEW)
    assert found == vp.answer(plain, tools, ["What?"], images=[[shown]], **NEW)


@pytest.mark.parametrize(
    ("messages", "more", "words"),
    [
        ([user(text("a"))], {}, "is one conversation"),
        ("What?", {}, "is one conversation"),
        ([[user(image(), text("a"))]], {}, r"1 image part\(s\) without an image.* 0 image"),
        ([[user(image(), text("a"))]], {"images": [[0, 1]]}, r"1 image part\(s\).* 2 image"),
        (
            [[user(image(), image(), text("a"))]],
            {"caches": True},
            r"2 image part\(s\), and its cache holds 1",
        ),
        ([[user(text("a"))]], {"caches": True}, r"0 image part\(s\), and its cache holds 1"),
        ([[user(image(), text("a"))]] * 2, {"caches": True}, "1 caches for 2 conversations"),
        ([[user(text("a")), {"role": "assistant", "content": "b"}]], {}, "ends with a turn of the assistant"),
        ([[{"role": "humen", "content": "a"}]], {}, "role 'humen'"),
        ([[{"from": "human", "value": "a"}]], {}, "'role' and a 'content'"),
        ([[user({"type": "video", "video": "a.mp4"})]], {}, "'video'"),
        ([[user("words")]], {}, "'words'"),
        ([[user({"type": "image", "image": "a.png", "url": "b"})]], {}, "holds 2 images"),
        ([[user(image("/no/such.png"), text("a"))]], {}, "prompt 0: image .*/no/such.png"),
        ([[]], {}, "give a list of turns"),
        ([[user(text("a"))]], {"text_before": "b"}, "text_before belongs to questions"),
        ([[user(text("a"))]], {"questions": ["a"]}, "one of the two"),
        (None, {}, "one of the two"),
        (None, {"questions": "What?"}, "questions is one string"),
        (None, {"questions": [[user(text("a"))]]}, "conversations as messages="),
        (None, {"questions": ["What?"], "images": ["a.png"]}, r"images\[0\] is one image"),
        (None, {"questions": ["What?"], "images": "a.png"}, "images is one image"),
        (None, {"questions": ["What?"], "caches": "one"}, "caches is one cache"),
    ],
)
def test_mistakes_get_one_line(messages, more, words) -> None:
    model, tools = made("llava_llama")
    if "caches" in more:
        (block,) = vp.compress_images(model, tools, pictures(1))
        more = {**more, "caches": block if more["caches"] == "one" else [block]}
    with pytest.raises(ValueError, match=words) as told:
        vp.answer(model, tools, messages=messages, **more, **NEW)
    assert "\n" not in str(told.value)


def test_a_template_that_drops_the_system_turn_is_refused() -> None:
    model, tools = made("llava_llama")
    tools.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{% for p in m['content'] if p['type'] == 'text' %}"
        "{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out the system text 'Be brief.'"):
        vp.answer(model, tools, messages=[[{"role": "system", "content": "Be brief."}, user(text("a"))]])


def test_iterators_are_lists_and_a_plain_model_compresses_nothing() -> None:
    model, tools = made("llava_llama")
    asked = [user(text("a"))]
    assert vp.answer(model, tools, messages=iter([asked]), **NEW) == vp.answer(model, tools, iter("a"), **NEW)
    with pytest.raises(ValueError, match="has no VoCo attached"):
        list(vp.compress_images(build("llava_llama"), tools, pictures(1)))


def test_what_was_half_hidden_is_public() -> None:
    for name in ("answer", "compress_images", "stream_of", "insert_voco_tokens", "log_likelihood"):
        assert name in vp.__all__ and callable(getattr(vp, name))
