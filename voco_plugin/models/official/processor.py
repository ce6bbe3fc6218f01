"""The processor of a converted checkpoint: its tokenizer with ``<image>``, the tower's image processor, and
the conversation the model was tuned with.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

IMAGE = "<image>"
_TEMPLATES = Path(__file__).parents[2] / "training" / "templates"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def load_tokenizer(folders: list[Path]) -> Any:
    """The tokenizer of the first of ``folders`` that has one, slow or fast, as a fast one.

    Raises:
        FileNotFoundError: none has one.
    """
    from transformers import AutoTokenizer, LlamaConfig

    for folder in folders:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            if (
                not (folder / "tokenizer.json").is_file()
                and importlib.util.find_spec("sentencepiece") is None
            ):
                raise ImportError(
                    f"{folder / 'tokenizer.model'} is a SentencePiece model: pip install "
                    "'voco_plugin[convert]'."
                )
            # the folder's own config.json names a class that transformers does not know
            tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.unk_token  # as the original code does
            tokenizer.padding_side = "left"
            return tokenizer
    raise FileNotFoundError(
        f"{' and '.join(map(str, folders))} hold no {' or '.join(_TOKENIZER_FILES)}; copy the tokenizer's "
        "files there."
    )


def add_image_token(tokenizer: Any) -> int:
    """The id of ``<image>``; the original code has none in its vocabulary (it marks images by id -200)."""
    from tokenizers import AddedToken

    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def image_processor(tower: Path, aspect_ratio: str | None) -> Any:
    """The image processor of the vision tower; ``pad`` makes images square first, in the mean colour.

    Raises:
        FileNotFoundError: the tower's folder has no preprocessor_config.json.
    """
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    if not (tower / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{tower} has no preprocessor_config.json, which says how images are prepared; add it."
        )
    values, _ = CLIPImageProcessor.get_image_processor_dict(str(tower))
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        values.pop(key, None)
    if aspect_ratio == "pad":
        return LlavaImageProcessor.from_dict({**values, "do_pad": True})
    return CLIPImageProcessor.from_dict(values)


def wrapped_image(config: dict[str, Any]) -> str:
    """``<image>`` with the markers that ``mm_use_im_start_end`` puts around it."""
    return f"<im_start>{IMAGE}<im_end>" if config.get("mm_use_im_start_end") else IMAGE


def chat_template(config: dict[str, Any], voco: str | None, num_tokens: int) -> str:
    """The conversation as a template: Vicuna v1, or VoCo-LLaMA's own with ``num_tokens`` times ``voco``."""
    name = "vicuna_v1" if voco is None else "voco_v1"
    text = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    text = text.replace(f"'{IMAGE}\\n'", f"'{wrapped_image(config)}\\n'")
    return text if voco is None else f"{{%- set voco = '{voco * num_tokens}' -%}}\n{text}"


def between_ids(tokenizer: Any, config: dict[str, Any], voco: str) -> set[int]:
    """The ids that stand between an image and its VoCo tokens (a line break), and markers around the image.

    They read the image and are read by its VoCo tokens there, as vision tokens are, and the text after does
    not see them.
    """
    ids = tokenizer(f"{wrapped_image(config)}\n{voco}", add_special_tokens=False)["input_ids"]
    bare = tokenizer("\n", add_special_tokens=False)["input_ids"]
    image, voco_id = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, voco))
    return {*ids, *bare} - {image, voco_id}


def make_processor(
    config: dict[str, Any], tokenizer: Any, images: Any, patch_size: int, template: str
) -> Any:
    """The ``LlavaProcessor`` of a converted checkpoint."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy(config),
        image_token=IMAGE,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=template,
    )


def select_strategy(config: dict[str, Any]) -> str:
    """``vision_feature_select_strategy`` for ``mm_vision_select_feature``."""
    feature = config.get("mm_vision_select_feature", "patch")
    known = {"patch": "default", "cls_patch": "full"}
    if feature not in known:
        raise ValueError(
            f"mm_vision_select_feature={feature!r} is not known; it is one of {', '.join(known)}."
        )
    return known[feature]
