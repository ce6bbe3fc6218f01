"""Real processor classes over the tiny vocabulary; what they return feeds `build(name)` directly.

Surprises of transformers 5.23:
- `image_token` and the like survive `save_pretrained` only as a mapping given to `extra_special_tokens`; set
  as plain attributes they are gone on reload, and gemma3's and internvl's processors then cannot be built.
- SmolVLMProcessor refuses to be built without the `num2words` package, even where there is no video.
- Gemma 3's chat templates hold the *start* token; its processor puts "\\n\\n" on both sides of the image.
- Idefics3 and SmolVLM scale every image up to `size["longest_edge"]`, so each one is tiled, however small;
  `do_image_splitting=False` (in `processor_kwargs`) leaves the global tile alone.
- Calls pad only with `processor_kwargs={"padding": True}`.
"""

from __future__ import annotations

from transformers import ProcessorMixin

from .vocab import tokenizer

NAMES: tuple[str, ...] = (
    "llava_llama",
    "llava_mistral",
    "llava_qwen2",
    "llava_tied",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "idefics3",
    "smolvlm",
)
"""Models that have a processor here."""

# One message is: opening, its text and image pieces in order, closing. Assistant text and its closing are
# inside `generation`, for return_assistant_tokens_mask and assistant-only losses.
_TEMPLATE = """\
{bos}{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' -%}}
{{{{- {assistant_open} -}}}}
{{%- generation -%}}
{{%- if message['content'] is string -%}}{{{{- message['content'] -}}}}{{%- else -%}}
{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{- part['text'] -}}}}{{%- endfor -%}}
{{%- endif -%}}
{{{{- {assistant_close} -}}}}
{{%- endgeneration -%}}
{{{{- {after_assistant} -}}}}
{{%- else -%}}
{{{{- {open} -}}}}
{{%- if message['content'] is string -%}}{{{{- message['content'] -}}}}{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{{{{- {image} -}}}}
{{%- elif part['type'] == 'text' -%}}{{{{- part['text'] -}}}}{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- {close} -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- {assistant_open} -}}}}{{%- endif -%}}"""


def _chat_template(image: str, style: str) -> str:
    bos = "{{- '<s>' -}}\n"
    if style == "vicuna":
        return _TEMPLATE.format(
            bos=bos, image=repr(image + "\n"), open="message['role'] | upper + ': '", close="' '",
            assistant_open="'ASSISTANT: '", assistant_close="'</s>'", after_assistant="''",
        )  # fmt: skip
    if style == "chatml":
        return _TEMPLATE.format(
            bos="", image=repr(image), open="'<|im_start|>' + message['role'] + '\\n'",
            close="'<|im_end|>\\n'", assistant_open="'<|im_start|>assistant\\n'",
            assistant_close="'<|im_end|>'", after_assistant="'\\n'",
        )  # fmt: skip
    if style == "gemma":
        return _TEMPLATE.format(
            bos=bos, image=repr(image), open="'<start_of_turn>' + message['role'] + '\\n'",
            close="'<end_of_turn>\\n'", assistant_open="'<start_of_turn>model\\n'",
            assistant_close="'<end_of_turn>'", after_assistant="'\\n'",
        )  # fmt: skip
    assert style == "idefics"
    return _TEMPLATE.format(
        bos=bos, image=repr(image), open="message['role'] | capitalize + ':'",
        close="'<end_of_utterance>\\n'", assistant_open="'Assistant: '",
        assistant_close="'<end_of_utterance>'", after_assistant="'\\n'",
    )  # fmt: skip


def _llava() -> ProcessorMixin:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template("<image>", "vicuna"),
    )


def _llava_onevision() -> ProcessorMixin:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"height": 12, "width": 12}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=[[12, 12], [12, 24], [24, 12], [24, 24]]
        ),
        tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_chat_template("<image>", "vicuna"),
    )


def _qwen2_5_vl(three: bool = False) -> ProcessorMixin:
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    shape = {"size": size, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    cls, video = (
        (Qwen3VLProcessor, Qwen3VLVideoProcessor) if three else (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    )
    return cls(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer(eos_token="<|im_end|>", **named),
        video_processor=video(**shape),
        chat_template=_chat_template("<|vision_start|><|image_pad|><|vision_end|>", "chatml"),
    )


def _qwen3_vl() -> ProcessorMixin:
    return _qwen2_5_vl(three=True)


def _internvl() -> ProcessorMixin:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 16, "width": 16}
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer(eos_token="<|im_end|>", **named),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=_chat_template("<IMG_CONTEXT>\n", "chatml"),
    )


def _gemma3() -> ProcessorMixin:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 24, "width": 24}),
        tokenizer=tokenizer(eos_token="<end_of_turn>", **named),
        image_seq_length=9,
        chat_template=_chat_template("<start_of_image>", "gemma"),
    )


def _idefics3() -> ProcessorMixin:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    size, tile = {"longest_edge": 32}, {"longest_edge": 16}
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size=size, max_image_size=tile),
        tokenizer=tokenizer(eos_token="<end_of_utterance>"),
        image_seq_len=4,
        chat_template=_chat_template("<image>", "idefics"),
    )


def _smolvlm() -> ProcessorMixin:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    size, tile = {"longest_edge": 32}, {"longest_edge": 16}
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
    }
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=tile),
        tokenizer=tokenizer(eos_token="<end_of_utterance>", **named),
        video_processor=SmolVLMVideoProcessor(size=size, max_image_size=tile),
        image_seq_len=4,
        chat_template=_chat_template("<image>", "idefics"),
    )


def processor(name: str) -> ProcessorMixin:
    """A fresh processor for `build(name)`; smolvlm's raises ImportError without the `num2words` package."""
    if name not in NAMES:
        raise ValueError(f"no tiny processor for {name!r}: choose from {', '.join(NAMES)}")
    make = globals().get(f"_{name}", _llava)  # the LLaVA-1.5 models share one
    return make()
