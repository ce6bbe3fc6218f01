"""The model ``voco`` of lmms-eval without the harness: arguments, prompts, one compression an image, a run
that goes on. What needs the harness: test_lmms_eval.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
import voco_plugin as vp
from eval_sets import pictures
from tiny import processors
from voco_plugin.cli.accelerate_launch import load_integration

arguments = load_integration("lmms_eval.arguments")
answer_log = load_integration("lmms_eval.answer_log")
loading = load_integration("lmms_eval.loading")
messages = load_integration("lmms_eval.messages")


# -- arguments


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs --model_args pretrained="),
        ({"pretrained": "m", "num_token": 2}, r"no argument 'num_token' \(did you mean 'num_tokens'\?\)"),
        ({"pretrained": "m", "num_tokens": 0}, "num_tokens=0: give a whole number"),
        ({"pretrained": "m", "num_tokens": 1.5}, "num_tokens=1.5: give a whole number"),
        ({"pretrained": "m", "mode": "vocoo"}, r"mode='vocoo' is none \(did you mean 'voco'\?\)"),
        ({"pretrained": "m", "rule": "isolate"}, r"rule='isolate' is none \(did you mean 'isolated'\?\)"),
        ({"pretrained": "m", "mode": "base", "num_tokens": 2}, "mode=base takes them off"),
        ({"pretrained": "m", "mode": "single", "store": "s"}, "mode=single makes none"),
        ({"pretrained": "m", "batch_size": "auto"}, "batch_size=auto is not known"),
        ({"pretrained": "m", "max_batch_size": 8}, "batch_size=auto is not known"),
        ({"pretrained": "m", "num_frames": 4, "fps": 1}, "give one of them"),
        ({"pretrained": "m", "time_text": "maybe"}, "time_text='maybe': give true or false"),
        ({"pretrained": "m", "b/c": 1}, "a comma in it goes in quotes"),
    ],
)
def test_a_wrong_argument_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as problem:
        arguments.read_args(given)
    assert "\n" not in str(problem.value)


def test_arguments_are_read_as_the_harness_hands_them_over() -> None:
    read = arguments.read_args(
        {"pretrained": '"a,b"', "batch_size": "32", "store": 7, "num_tokens": 2.0, "max_batch_size": None}
    )
    assert (read.pretrained, read.batch_size, read.store, read.num_tokens) == ("a,b", 32, "7", 2)


# -- prompts


def test_a_chat_prompt_keeps_the_order_of_its_parts() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    content = [{"type": "image", "url": red}, {"type": "text", "text": "a"}, {"type": "image", "url": blue}]
    prompt = messages.read_chat([{"role": "user", "content": content}], messages.Videos(), "t")
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image", "text", "image"]
    assert prompt.images == [red, blue]
    with pytest.raises(ValueError, match="t holds audio"):
        messages.read_chat(
            [{"role": "user", "content": [{"type": "audio", "url": "x"}]}], messages.Videos(), "t"
        )


def test_a_simple_prompt_shows_its_visuals_first_or_where_the_text_says() -> None:
    shown = pictures(2)
    first = messages.read_simple("which", shown, messages.Videos(), "t").messages[0]["content"]
    assert [part["type"] for part in first] == ["image", "image", "text"]
    placed = messages.read_simple("one <image>\ntwo <image>\nwhich", shown, messages.Videos(), "t")
    content = placed.messages[0]["content"]
    assert [part.get("text") for part in content] == ["one ", None, "\ntwo ", None, "which"]
    with pytest.raises(ValueError, match=r"has 1 <image> for 2"):
        messages.read_simple("<image>", shown, messages.Videos(), "t")
    assert messages.read_simple("text alone", None, messages.Videos(), "t").images == []


def test_a_video_becomes_its_frames_and_is_decoded_once(tmp_path: Path, monkeypatch) -> None:
    frames = pictures(6)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    opened = []
    plain = messages.read_video
    monkeypatch.setattr(messages, "read_video", lambda *a, **k: opened.append(a) or plain(*a, **k))
    videos = messages.Videos(count=3, time_text=True)
    turn = [{"role": "user", "content": [{"type": "video", "url": str(tmp_path / "a.gif")}]}]
    prompt = messages.read_chat(turn, videos, "t")
    assert [part.get("text", "") for part in prompt.messages[0]["content"]][::2] == [
        "<0.1s>",
        "<0.3s>",
        "<0.5s>",
    ]
    assert len(prompt.images) == 3
    messages.read_chat(turn, videos, "t")
    assert len(opened) == 1


# -- answers


@pytest.fixture(scope="module")
def attached() -> tuple[Any, Any]:
    model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
    return vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor), processor


def reader(attached: tuple[Any, Any], **given: Any) -> Any:
    return loading.reader_of(*attached, arguments.ModelArgs(pretrained="", **{"batch_size": 4, **given}))


def prompts(images: list[Image.Image], each: int = 3) -> list[Any]:
    made = []
    for number in range(each):
        for image in images:
            content = [{"type": "image", "url": image}, {"type": "text", "text": f"what is {number}"}]
            made.append(messages.read_chat([{"role": "user", "content": content}], messages.Videos(), "t"))
    return made


@pytest.fixture
def compressed(monkeypatch) -> list[int]:
    """How many images each call of ``vp.compress_images`` was given."""
    seen: list[int] = []
    plain = vp.compress_images

    def counted(model: Any, processor: Any, images: Any, **options: Any) -> Any:
        images = list(images)
        seen.append(len(images))
        return plain(model, processor, images, **options)

    monkeypatch.setattr(vp, "compress_images", counted)
    return seen


def test_every_image_is_compressed_once_and_again_never(
    attached: tuple[Any, Any], tmp_path: Path, compressed: list[int]
) -> None:
    shown = pictures(3)
    one = reader(attached, store=str(tmp_path / "store"))
    first = one.answer(prompts(shown), max_new_tokens=4)
    assert sum(compressed) == one.compressed == 3 and one.asked == 9
    one.close()
    two = reader(attached, store=str(tmp_path / "store"), batch_size=1)
    assert two.answer(prompts(shown), max_new_tokens=4) == first
    assert sum(compressed) == 3 and two.compressed == 0
    two.close()


def test_cached_single_and_batched_answers_are_equal(attached: tuple[Any, Any]) -> None:
    shown = pictures(4)
    several = prompts(shown[:2]) + [
        messages.read_simple("compare", shown, messages.Videos(), "t"),
        messages.read_simple("no picture", [], messages.Videos(), "t"),
    ]
    found = []
    for given in ({"batch_size": 1}, {"batch_size": 8}, {"batch_size": 8, "mode": "single"}):
        one = reader(attached, **given)
        found.append(one.answer(several, max_new_tokens=4))
        one.close()
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 1


def test_likelihoods_read_from_the_cache_are_those_of_one_pass(
    attached: tuple[Any, Any], compressed: list[int]
) -> None:
    shown, endings = pictures(2), [["red", "blue square"]] * 6
    found = []
    for mode in ("voco", "single"):
        one = reader(attached, mode=mode)
        found.append([score for scores in one.likelihood(prompts(shown), endings) for score in scores])
        one.close()
    assert sum(compressed) == 2
    for a, b in zip(*found, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-3) and a.is_greedy == b.is_greedy


def test_without_images_a_blind_model_reads_the_words_alone() -> None:
    # detaches: a model of its own
    model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
    model = vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor)
    one = reader((model, processor), mode="blind")
    assert not vp.is_attached(one.model)
    answers = one.answer(prompts(pictures(2), 1), max_new_tokens=4)
    assert answers[0] == answers[1]
    one.close()


def test_a_run_that_was_interrupted_goes_on(attached: tuple[Any, Any], tmp_path: Path) -> None:
    log, asked = tmp_path / "answers.jsonl", prompts(pictures(3))
    whole = reader(attached)
    expected = whole.answer(prompts(pictures(3)), max_new_tokens=4)
    whole.close()
    one = reader(attached, answers=str(log))

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.answer(asked, stop, max_new_tokens=4)
    one.close()
    with open(log, "a") as file:
        file.write('{"key": "cut o')  # killed while writing
    two = reader(attached, answers=str(log), batch_size=2)
    assert two.answer(prompts(pictures(3)), max_new_tokens=4) == expected
    assert (one.asked, two.asked) == (4, 5)
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 9
    two.close()


@pytest.mark.parametrize("change", ["length", "words", "picture", "mode"])
def test_an_answer_is_not_taken_for_one_to_something_else(
    attached: tuple[Any, Any], tmp_path: Path, change: str
) -> None:
    log = str(tmp_path / "answers.jsonl")
    one = reader(attached, answers=log)
    one.answer(prompts(pictures(1), 1), max_new_tokens=4)
    one.close()
    two = reader(attached, answers=log, mode="single" if change == "mode" else "voco")
    other = prompts(pictures(1, seed=5 if change == "picture" else 0), 1)
    if change == "words":
        other[0].messages[0]["content"][1]["text"] = "another"
    two.answer(other, max_new_tokens=3 if change == "length" else 4)
    assert two.asked == 1
    two.close()


def test_samples_are_drawn_anew(attached: tuple[Any, Any], tmp_path: Path) -> None:
    one = reader(attached, answers=str(tmp_path / "answers.jsonl"))
    for count in (1, 2):
        one.answer(prompts(pictures(1), 1), max_new_tokens=4, do_sample=True, temperature=1.0)
        assert one.asked == count
    one.close()


def test_a_file_that_is_no_answer_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1 is none of an answer file"):
        answer_log.AnswerLog(tmp_path / "x.json")
    with pytest.raises(ValueError, match="is a folder"):
        answer_log.AnswerLog(tmp_path)


# -- what cannot be read from a cache


def test_the_store_of_another_model_is_refused(attached: tuple[Any, Any], tmp_path: Path) -> None:
    one = reader(attached, store=str(tmp_path / "store"))
    one.answer(prompts(pictures(1), 1), max_new_tokens=2)
    one.close()
    other = tiny.build("llava_llama", seed=1)
    processor = processors.processor("llava_llama")
    other = vp.attach(other, vp.VoCoConfig(num_tokens=2), processor=processor)
    with pytest.raises(vp.VoCoCacheError, match="model"):
        reader((other, processor), store=str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "causal"}, "mode=voco: under rule 'causal' text reads the vision tokens"),
        ({"block_context": "prefix"}, "mode=voco: with block_context='prefix' a block belongs to the prompt"),
    ],
)
def test_a_model_without_blocks_for_all_questions_is_refused_in_the_cached_mode(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
    model = vp.attach(model, vp.VoCoConfig(num_tokens=2, **options), processor=processor)
    with pytest.raises(ValueError, match=f"{said}.*give mode=single"):
        reader((model, processor))
    with pytest.raises(ValueError, match="leave store out and give mode=single"):
        reader((model, processor), store=str(tmp_path / "s"))
    one = reader((model, processor), mode="single")
    assert len(one.answer(prompts(pictures(1), 1), max_new_tokens=2)) == 1
    one.close()
