"""The tiny VLM's processor: a tokenizer trained on gridworld text, a CLIP image processor, a chat template.

<s> USER: <image>
What is at a1? ASSISTANT: red circle</s> USER: Is there a digit 7? ASSISTANT: no</s>

and for the question set `terse`

<s><image> Object at a1 circle</s> Any digit 3 no</s>
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from voco_plugin.data.conversations import time_text
from voco_plugin.evaluation.boxes import SCALE
from voco_plugin.gridworld.levels import question_types
from voco_plugin.gridworld.questions import ask, describe
from voco_plugin.gridworld.scenes import COLORS, SPLITS, place, sample_placement, sample_scene
from voco_plugin.gridworld.video_questions import ask_video
from voco_plugin.gridworld.video_scenes import sample_story

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}"
    "{% else %}{{ ' ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

TERSE_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
)
"""For short questions: the answer follows at once, no word is said about who speaks."""

TEMPLATES = {"phrases": CHAT_TEMPLATE, "words": CHAT_TEMPLATE, "terse": TERSE_TEMPLATE}
"""The chat template that goes with each question set."""


_MARKS = {True: r"[\n?,.]| ?\[|\]", False: r"[\n?,.]"}
_TIMES = r" ?<(?=[\d.]+s>)|\d(?=\d*\.\d+s>)|\.\d+s>|"


def build_processor(
    image_size: int = 64,
    patch_size: int = 16,
    question_set: str = "phrases",
    boxes: bool = False,
    video: bool = False,
) -> LlavaProcessor:
    """The processor of the tiny VLM: images of `image_size` pixels a side, in patches of `patch_size`; a
    tokenizer that has the words of `question_set` (and of boxes, of videos)."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(question_set, boxes, video),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[question_set],
    )


def build_tokenizer(
    question_set: str = "phrases", boxes: bool = False, video: bool = False
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on gridworld text, the same for a question set: its words (and with
    `boxes` coordinates) are single tokens.

    With `video` so are the words of questions about videos; a time text is `<`, each figure of its seconds,
    and the rest from the point on, so that a long video has no token that a short one lacks.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex((_TIMES if video else "") + _MARKS[boxes]), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=704,
        special_tokens=special,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
        show_progress=False,
    )
    corpus = _corpus(question_set, boxes) + (_video_corpus() if video else [])
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _corpus(question_set: str, boxes: bool, num_scenes: int = 400) -> list[str]:
    """Gridworld conversations, 3 x 3 cells and all colours: one vocabulary serves every setting."""
    rng = np.random.default_rng(0)
    lines = [f" {number}" for number in range(19) for _ in range(50)]
    types = question_types(question_set, boxes)
    if boxes:
        lines += [f" [{number:02d},{number:02d}]" for number in range(SCALE + 1) for _ in range(50)]
    for index in range(num_scenes):
        scene = sample_scene(rng, 3, len(COLORS), SPLITS[index % 2])
        if boxes:
            scene = place(scene, sample_placement(scene, rng, 16), 16)
        turns = [*ask(scene, rng, 12, len(COLORS), types), describe(scene)]
        for turn in turns:
            lines.append(f" USER: \n{turn.question} ASSISTANT: {turn.answer}")
            lines.append(f" USER: {turn.question} ASSISTANT: {turn.answer}")
    return lines


def _video_corpus(num_videos: int = 400) -> list[str]:
    """Questions about gridworld videos, and time texts."""
    rng = np.random.default_rng(0)
    lines = [f"{time_text(tenths / 10)}\n {time_text(tenths / 10)}" for tenths in range(1000)]
    lines += [f" {word}" for word in ("start", "end", "after", "before") for _ in range(100)]
    lines += [" Which digit", " Cell of digit at end", " Is digit before"] * 100
    for index in range(num_videos):
        video = sample_story(rng, 16, len(COLORS), SPLITS[index % 2], 1.0)
        for turn in ask_video(video, rng, 12, "story"):
            lines.append(f" {turn.question} {turn.answer}")
    return lines
