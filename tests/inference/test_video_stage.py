"""A video's blocks: two stages equal one pass for every family that takes videos, chunks change nothing, and
what cannot be done says so.
"""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from video_harness import VIDEO_FAMILIES, frames, made, one_pass
from voco_plugin.cache import VoCoCache
from voco_plugin.core.layout import TokenKind
from voco_plugin.data.conversations import time_text
from voco_plugin.inference import prompts
from voco_plugin.inference.prompts import (
    image_text,
    keeps_order,
    render,
    stream_ids,
    stream_ids_in_pieces,
    with_counts,
)
from voco_plugin.inference.streaming.compress_frames import (
    compress_segments,
    compress_video,
    encode_videos,
    resolve_frames_as,
)
from voco_plugin.inference.streaming.video_prompt import check_layout, video_parts
from voco_plugin.video.frames import Segment

IMAGES = ["llava_llama", "llava_mistral", "gemma3", "internvl", "qwen2_5_vl", "llava_next_video"]


def prompt(model, tools, times, time_text) -> list[int]:
    """The stream of a question after a video, one VoCo token a block."""
    content = [*video_parts(times, time_text), {"type": "text", "text": "What is it?"}]
    text = render(tools, [[{"role": "user", "content": content}]])[0]
    return stream_ids(model, tools, [text], [len(times)])[0]


@torch.no_grad()
def both_ways(name: str, size: int, frames_as: str, time_text: bool, **options) -> float:
    """Largest difference of the text's logits: one masked pass, and the question read over blocks."""
    model, tools = made(name, **options)
    shown = list(frames(3 * size, rate=2.0))
    pairs = list(
        compress_segments(model, tools, shown, frames_per_block=size, frames_as=frames_as, batch_size=2)
    )
    cache = VoCoCache.cat([c for _, c in pairs])
    segments = [s for s, _ in pairs]
    assert [len(s.frames) for s in segments] == [size] * 3 and len(cache) == 3
    voco = vp.attachment(model).vocab.voco_id
    stream = with_counts(prompt(model, tools, [s.time for s in segments], time_text), cache.num_tokens, voco)
    ids = torch.tensor([stream])
    cached = model(input_ids=ids, attention_mask=torch.ones_like(ids), voco_cache=cache).logits[0]
    whole = one_pass(model, tools, stream, segments, frames_as)
    vocab = vp.attachment(model).vocab
    logits = model(**whole).logits[0]
    layout = vp.SequenceLayout.from_ids(whole["input_ids"], whole["attention_mask"], vocab)
    text = (layout.kind[0] == TokenKind.TEXT).nonzero().flatten()
    there = (ids[0] != voco).nonzero().flatten()
    assert len(text) == len(there) and len(whole["input_ids"][0]) > len(stream)
    return float((logits[text] - cached[there]).abs().max())


@pytest.mark.parametrize("time_text", [False, True], ids=["plain", "times"])
@pytest.mark.parametrize("name", IMAGES)
def test_frames_as_images_are_two_stages_of_one_pass(name, time_text):
    assert both_ways(name, 1, "auto", time_text) <= 1e-4


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_segments_as_videos_are_two_stages_of_one_pass(name, size):
    if name == "qwen3_vl" and size == 4:
        pytest.skip("Qwen3-VL writes each temporal patch of two frames apart: a block is two frames")
    if name.startswith("qwen") and size == 1:
        pytest.skip("Qwen-VL merges two frames: one is an image")
    assert both_ways(name, size, "video", True) <= 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next_video"])
def test_sequential_positions_hold_too(name):
    assert both_ways(name, 2, "video", True, positions="sequential") <= 1e-4


def test_merged_frames_are_all_seen():
    """Another second frame makes another block: a segment is not its first frame."""
    for name in VIDEO_FAMILIES:
        model, tools = made(name)
        a, b, c = frames(3)
        one, two = compress_video(model, tools, [Segment((a, b)), Segment((a, c))], frames_as="video")
        assert (one.blocks[0].values[-1] - two.blocks[0].values[-1]).abs().max() > 1e-3, name
        assert one.blocks[0].num_vision == two.blocks[0].num_vision


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_segment_has_the_markers_of_one_image(name):
    """Its start and end marker once each, whoever writes them: template or processor."""
    model, tools = made(name)
    grid = encode_videos(model, tools, [Segment(tuple(frames(2)))])["video_grid_thw"]
    (cache,) = compress_video(model, tools, frames(2), frames_per_block=2)
    assert cache.blocks[0].num_vision == int(grid.prod()) // 4 + 2


def test_chunks_change_nothing_and_are_read_as_they_are_needed():
    model, tools = made("llava_llama")
    shown = frames(7)
    read = []

    def source():
        for frame in shown:
            read.append(frame.index)
            yield frame

    made_of = compress_video(model, tools, source(), batch_size=3)
    first = next(made_of)
    assert read == [0, 1, 2]  # a chunk, no more
    caches = [first, *made_of]
    alone = [next(compress_video(model, tools, [frame], batch_size=1)) for frame in shown]
    for one, other in zip(caches, alone, strict=True):
        assert one.blocks[0].position == other.blocks[0].position
        for x, y in zip(one.blocks[0].keys, other.blocks[0].keys, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_a_last_segment_may_be_shorter():
    model, tools = made("qwen2_5_vl")
    ticks = []
    pairs = list(
        compress_segments(model, tools, frames(5), frames_per_block=2, batch_size=8, tick=ticks.append)
    )
    assert [len(s.frames) for s, _ in pairs] == [2, 2, 1] and ticks == [2, 2, 1]
    alone = list(compress_video(model, tools, [Segment(tuple(frames(5)[:2]))]))
    torch.testing.assert_close(pairs[0][1].blocks[0].keys[0], alone[0].blocks[0].keys[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "frames_as", "message"),
    [
        ("llava_llama", 2, "auto", "takes no videos"),
        ("llava_llama", 1, "video", "takes no videos"),
        ("qwen2_5_vl", 2, "image", "makes a block of one frame, not of 2"),
        ("qwen2_5_vl", 3, "auto", "must be a multiple of 2"),
        ("qwen2_5_vl", 2, "film", "not known"),
        ("qwen3_vl", 4, "video", "2 runs of vision tokens"),
        ("internvl", 2, "video", "2 runs of vision tokens"),
        ("llava_llama", 0, "auto", "must be at least 1"),
    ],
)
def test_what_cannot_be_one_block_says_so(name, size, frames_as, message):
    model, tools = made(name)
    with pytest.raises(ValueError, match=message):
        list(compress_video(model, tools, frames(4), frames_per_block=size, frames_as=frames_as))


def test_one_frame_is_an_image_where_nothing_is_said():
    _, tools = made("qwen2_5_vl")
    assert resolve_frames_as(tools, 1) == "image" and resolve_frames_as(tools, 2) == "video"


# -- the prompt
# ------------------------------------------------------------------------------------------------------------

STREAMS = ["llava_llama", "qwen2_5_vl", "gemma3", "internvl", "idefics3", "llava_onevision"]


@pytest.mark.parametrize("time_text", [False, True], ids=["plain", "times"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_long_prompt_in_pieces_is_the_whole_one(name, time_text):
    model, tools = made(name)
    content = [{"type": "text", "text": "See: "}, *video_parts([n / 2 for n in range(70)], time_text)]
    turn = {"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}
    text = render(tools, [[turn]])[0]
    known: dict = {}
    (whole,) = stream_ids(model, tools, [text], [70])
    assert text.count(image_text(tools)) == 70  # else it would not have been cut
    assert stream_ids_in_pieces(model, tools, text, 70, known=known) == whole
    assert known and stream_ids_in_pieces(model, tools, text, 70, known=known) == whole
    assert len(known) == (69 if time_text else 1)


def test_known_pieces_are_not_tokenized_again(monkeypatch):

    model, tools = made("llava_llama")
    seen = []
    real = prompts.stream_ids
    monkeypatch.setattr(prompts, "stream_ids", lambda *a: (seen.append(a[3][0]), real(*a))[1])
    known: dict = {}
    for last in (40, 41):
        seen.clear()
        parts = [*video_parts([float(n) for n in range(last)], True), {"type": "text", "text": "?"}]
        text = render(tools, [[{"role": "user", "content": parts}]])[0]
        stream_ids_in_pieces(model, tools, text, last, known=known)
    assert sum(seen) == 1 + 1 + 2  # the head, the tail, and one new time between two images


def test_the_stream_of_many_images_is_written_a_few_at_a_time(monkeypatch):
    model, tools = made("llava_llama")
    (block,) = compress_video(model, tools, frames(1, rate=1.0))
    talks = [
        [{"role": "user", "content": [*video_parts(range(n)), {"type": "text", "text": "?"}]}]
        for n in (40, 3)
    ]
    cache = VoCoCache.stack([VoCoCache.cat([block] * n) for n in (40, 3)])
    widest: list[int] = []
    real = prompts.stream_ids
    monkeypatch.setattr(prompts, "stream_ids", lambda *a: (widest.append(max(a[3])), real(*a))[1])
    found = prompts.stream_of(model, tools, talks, cache)
    assert max(widest) <= 32
    monkeypatch.setattr(prompts, "_IMAGES_AT_ONCE", 100)
    whole = prompts.stream_of(model, tools, talks, cache)
    assert max(widest) == 40 and all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_time_is_text_of_one_decimal():
    assert [time_text(t) for t in (0, 12, 3725.46)] == ["<0.0s>", "<12.0s>", "<3725.5s>"]
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="time"):
            time_text(bad)
    assert video_parts([0, 1.5], True) == [
        {"type": "text", "text": "<0.0s>"}, {"type": "image"},
        {"type": "text", "text": "<1.5s>"}, {"type": "image"},
    ]  # fmt: skip


HOISTING = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_writes_images_first_gives_no_times():
    model, tools = made("llava_llama")
    assert keeps_order(tools)
    tools.chat_template = HOISTING  # LLaVA-1.5's
    config = vp.attachment(model).config
    assert not keeps_order(tools) and image_text(tools) == "<image>\n"
    check_layout(config, tools, False)
    with pytest.raises(ValueError, match="images before all text"):
        check_layout(config, tools, True)


def test_positions_and_context_are_checked():
    model, tools = made("llava_llama", positions="sequential")
    with pytest.warns(UserWarning, match="uses up as many positions"):
        check_layout(vp.attachment(model).config, tools, False)
    model, tools = made("llava_llama", block_context="prefix", positions="sequential")
    with pytest.raises(ValueError, match="block_context='self'"):
        check_layout(vp.attachment(model).config, tools, False)
