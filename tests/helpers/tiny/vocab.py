"""One small vocabulary for every tiny model: fixed ids, and the tokenizer that speaks them.

Ids: the special tokens of every family first, then the printable ASCII bytes of a byte-level BPE, then its
merges. Any ASCII text survives encode → decode unchanged. A family uses only its own specials.
"""

from __future__ import annotations

from functools import cache

ROW_COL = tuple(f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3))
SPECIALS: tuple[str, ...] = (
    "<pad>", "<s>", "</s>", "<unk>", "<unused0>", "<unused1>",
    "<image>",  # llava*, idefics3, smolvlm
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",  # qwen*-vl
    "<IMG_CONTEXT>", "<img>", "</img>", "<video>",  # internvl
    "<image_soft_token>", "<start_of_image>", "<end_of_image>",  # gemma3
    "<fake_token_around_image>", "<global-img>", *ROW_COL, "<end_of_utterance>",  # idefics3, smolvlm
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
_SPACE, _NEWLINE, _TAB = "Ġ", "Ċ", "ĉ"  # how byte-level BPE spells them
_BYTES: tuple[str, ...] = (_TAB, _NEWLINE, _SPACE, *(chr(c) for c in range(33, 127)))
_WORDS = ("the", "what", "color", "shape", "is", "red", "blue", "green", "square", "circle", "image", "USER")
_MERGES: tuple[tuple[str, str], ...] = tuple(
    dict.fromkeys(
        [(_NEWLINE, _NEWLINE)]  # "\n\n" is one token, as in the Llama 3, SmolLM2 and Gemma vocabularies
        + [((_SPACE + w)[:i], (_SPACE + w)[i]) for w in _WORDS for i in range(1, len(w) + 1)]
    )
)
TOKENS: tuple[str, ...] = tuple(dict.fromkeys((*SPECIALS, *_BYTES, *(a + b for a, b in _MERGES))))
IDS: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}

PAD, BOS, EOS = IDS["<pad>"], IDS["<s>"], IDS["</s>"]
SPARE = IDS["<unused0>"]
NEWLINE, DOUBLE_NEWLINE = IDS[_NEWLINE], IDS[_NEWLINE * 2]
TEXT: tuple[int, ...] = tuple(sorted(set(range(len(SPECIALS), len(TOKENS))) - {NEWLINE, DOUBLE_NEWLINE}))
"""Ordinary text ids: no special token, and no newline (which Idefics3 also writes inside an image)."""


_SPLIT = r""" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"""
"""Keeps a run of newlines in one piece, as the Llama 3 and Qwen patterns do (GPT-2's does not)."""


@cache
def _backend_json() -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [(a, b) for a, b in _MERGES]
    backend = Tokenizer(models.BPE(vocab=dict(IDS), merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return backend.to_str()


def tokenizer(eos_token: str = "</s>", padding_side: str = "left", **named: str):
    """A fresh fast tokenizer over `TOKENS`; `named` are family attributes, e.g. image_token="<image>"."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend_json()),
        pad_token="<pad>", bos_token="<s>", eos_token=eos_token, unk_token="<unk>",
        padding_side=padding_side, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named,
    )  # fmt: skip
