"""Tiny videos, the processors that take them, and one masked pass over a prompt with all its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

import voco_plugin as vp
from tiny import build
from tiny.processors import _chat_template, processor
from tiny.vocab import tokenizer
from voco_plugin.core.layout import SequenceLayout, TokenKind
from voco_plugin.inference.prompts import ask, encode
from voco_plugin.inference.streaming.compress_frames import encode_videos, resolve_frames_as
from voco_plugin.video.frames import Frame, Segment

VIDEO_FAMILIES = ("llava_next_video", "video_llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
"""Families that take videos, and that a segment of two frames is one block of."""

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def frames(count: int, rate: float = 2.0, seed: int = 0) -> list[Frame]:
    """Pictures of 4 × 4 random tones, 32 pixels a side, ``rate`` a second."""
    generator = torch.Generator().manual_seed(seed)
    tones = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(t.numpy()).resize((32, 32), Image.Resampling.NEAREST) for t in tones]
    return [Frame(picture, number / rate, number) for number, picture in enumerate(pictures)]


def video_processor(name: str) -> Any:
    """As ``tiny.processors.processor``, for two more families that take videos."""
    import transformers as hf

    more = {"tokenizer": tokenizer(image_token="<image>", video_token="<video>"),
            "chat_template": _chat_template("<image>", "vicuna")}  # fmt: skip
    size, crop = {"shortest_edge": 12}, {"height": 12, "width": 12}
    if name == "llava_next_video":
        return hf.LlavaNextVideoProcessor(
            image_processor=hf.LlavaNextImageProcessor(
                size=size, crop_size=crop, image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]]
            ),
            video_processor=hf.LlavaNextVideoVideoProcessor(size=size, crop_size=crop),
            patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1, **more,
        )  # fmt: skip
    if name == "video_llava":
        return hf.VideoLlavaProcessor(
            image_processor=hf.VideoLlavaImageProcessor(size=size, crop_size=crop),
            video_processor=hf.VideoLlavaVideoProcessor(size=size, crop_size=crop),
            patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **more,
        )  # fmt: skip
    return processor(name)


def made(name: str, **options: Any) -> tuple[Any, Any]:
    """An attached tiny model, K = 2, and its processor."""
    tools = video_processor(name)
    return vp.attach(build(name), vp.VoCoConfig(num_tokens=2, **options), processor=tools), tools


def one_pass(
    model: Any, tools: Any, stream: Sequence[int], shown: Sequence[Any], frames_as: str = "auto"
) -> dict[str, Any]:
    """The inputs of one masked pass over ``stream``, the vision tokens of each block put back before its VoCo
    tokens: what stage 1 and stage 2 together must equal.

    Args:
        shown: of each block, in order, its segment.
    """
    vocab = vp.attachment(model).vocab
    alone = []
    for segment in shown:
        way = resolve_frames_as(tools, len(segment.frames), frames_as)
        plain = (
            encode_videos(model, tools, [segment])
            if way == "video"
            else encode(tools, [ask("")], [[segment.frames[0].image]])
        )
        alone.append(model.insert_voco_tokens(plain))
    ids: list[int] = []
    block = -1
    before = None
    count = 0
    for token in stream:
        if token == vocab.voco_id:
            if before != token or count == 2:  # K = 2
                block, count = block + 1, 0
                one = alone[block]
                layout = SequenceLayout.from_ids(one["input_ids"], one["attention_mask"], vocab)
                ids += one["input_ids"][0, layout.kind[0] == TokenKind.VISION].tolist()
            count += 1
        ids.append(token)
        before = token
    assert block + 1 == len(shown)
    batch: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in alone[0]:
        if key not in _PER_TOKEN and key != "batch_num_images":
            dim = 1 if "idefics" in type(tools).__name__.lower() else 0
            batch[key] = torch.cat([torch.as_tensor(one[key]) for one in alone], dim=dim)
        elif key == "batch_num_images":
            batch[key] = torch.cat([one[key] for one in alone])
    given = model._voco_attachment.family.token_types(model.config, batch["input_ids"])
    if "mm_token_type_ids" in alone[0]:
        batch["mm_token_type_ids"] = given
    if "token_type_ids" in alone[0]:
        batch["token_type_ids"] = (given > 0).long()
    return batch


def segment(*shown: Frame) -> Segment:
    return Segment(tuple(shown))


class Turns:
    """What a session gives to generate, and the logits of each answer's first token."""

    def __init__(self, model: Any, monkeypatch: Any) -> None:
        self.ids: list[list[int]] = []
        self.new: list[list[int]] = []
        self.logits: list[torch.Tensor] = []
        self.prefixes: list[Any] = []
        real = model.generate

        def generate(**kwargs: Any) -> Any:
            output = real(**kwargs, output_logits=True)
            ids = kwargs["input_ids"][0].tolist()
            self.ids.append(ids)
            self.new.append(output.sequences[0, len(ids) :].tolist())
            self.logits.append(torch.stack([x[0] for x in output.logits]))
            self.prefixes.append(kwargs["prefix_cache"])
            return output

        monkeypatch.setattr(model, "generate", generate)
